"""Training in INT8 or INT4 with a cache of fp32 rows, beside FBGEMM's own training TBE: memory, time, hits and AUC.

    python benchmarks/cache.py --data ciao.csv             # everything; 10 GB of memory
    python benchmarks/cache.py --only step                 # one part; without --data, AUC and ciao's hits are left out
    python benchmarks/cache.py --quick --data ciao.csv     # smaller tables, fewer seeds; ends within 2 minutes

All sides use row-wise Adagrad, one table for each feature, and Zipf ids (1.05), whose numbers are in frequency order
or shuffled, or uniform ids. Every batch is new.

memory: all bytes of a table while it trains. fp32 and fp16 are FBGEMM's TBE with its optimizer state; ours are the
    store, which has the state of every row, the fp32 rows and state of the cache and of the spill area as large as
    training made it, and the directory. A ratio is fp32's bytes over a variant's.
step: forward and backward, with the prefetch, all variants in one process in turns. A ratio is a variant's time over
    that of fp32 with a table for each feature, as ours have; beside it stands the ratio to fp32 with all features in
    one table, whose backward FBGEMM computes in another way on a CPU. "prefetch" is its share of the step. "with a
    network" are steps of the layers 512-512-256-1 over the embeddings too.
hits: the share of a batch's distinct rows that is in the cache, by load factor, over the second half of a run.
auc: the change of the test AUC to fp32 with the same seed (split, initial rows, order), after the cache is flushed, in
    1e-4: mean, standard deviation over seeds and standard error. "fp32 again" has the same split, but other initial
    rows and another order: by so much an AUC changes by chance. ``torchrec-mpe run --method cache:int8:0.05`` is the
    same code.
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cache_workload import Steps, Workload, counted, module_bytes, network, this_device
from click_logs import one_quiet_thread, prepare_ciao
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from measure import interleave, medians, ratio, versions, write_json
from torch import Tensor
from tqdm import tqdm

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.training.method import Method
from torchrec_mpe.app.training.pipeline import run_pipeline
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.app.training.settings import Settings
from torchrec_mpe.app.training.stages import Job
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.statistics import CacheStatistics
from torchrec_mpe.files.text_table import text_table

SECTIONS = ("memory", "step", "hits", "auc")
DIMS = (16, 64, 128)
IDS = ("zipf", "zipf, shuffled", "uniform")
LOAD_FACTORS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
LOOKUPS = (2048, 10)  # bags a batch of one feature, and ids a bag
LRU, LFU = CacheAlgorithm.LRU, CacheAlgorithm.LFU
VARIANTS = {
    "INT8 5% LRU": CacheConfig(8, 0.05, LRU),
    "INT8 5% LFU": CacheConfig(8, 0.05, LFU),
    "INT4 1% LRU": CacheConfig(4, 0.01, LRU),
    "INT4 1% LFU": CacheConfig(4, 0.01, LFU),
}
MEMORY_GOALS = {
    ("INT8 5% LRU", 64): 3.0,
    ("INT4 1% LFU", 64): 6.0,
    ("INT4 1% LRU", 128): 7.0,
    ("INT4 1% LFU", 128): 7.0,
}
STEP_GOALS = {"zipf": 1.1, "zipf, shuffled": 1.1, "uniform": 1.2}
AUC_GOALS = {"INT8 5% LRU": -3e-4, "INT4 1% LFU": -8e-4}
AGAIN = "fp32 again"
Record = dict[str, Any]


def memory(rows: int, steps: int, dims: Sequence[int] = DIMS) -> Iterator[Record]:
    """Bytes of one table of each variant after some steps."""
    for dim in dims:
        load = Workload(1, rows, dim, *LOOKUPS)
        fp32 = module_bytes(load.fbgemm())
        fp16 = module_bytes(load.fbgemm(SparseType.FP16))
        shared = {"section": "memory", "dim": dim, "rows": rows, "goal": None}
        yield {**shared, "case": f"memory, fp32, D={dim}", "variant": "fp32", "bytes": fp32, "ratio": 1.0}
        yield {**shared, "case": f"memory, fp16, D={dim}", "variant": "fp16", "bytes": fp16, "ratio": fp32 / fp16}
        for name, config in VARIANTS.items():
            for ids in ("zipf", "uniform"):
                tbe = load.cached(config)
                step = Steps(tbe, load.batches(ids, steps))
                for _ in range(steps):
                    step()
                kinds = tbe.bytes_by_kind()
                yield {
                    **shared,
                    "case": f"memory, {name}, D={dim}, {ids} ids",
                    "variant": name,
                    "ids": ids,
                    "bytes": sum(kinds.values()),
                    "bytes_by_kind": kinds,
                    "hit_rate": counted(tbe).hit_rate,
                    "ratio": fp32 / sum(kinds.values()),
                    "goal": MEMORY_GOALS.get((name, dim)) if ids == "zipf" else None,
                }


def step_times(
    load: Workload, warm: int, rounds: int, ids: Sequence[str] = IDS, *, whole: bool = False
) -> Iterator[Record]:
    """Times of the variants' steps, ``whole`` with a network, in turns, after ``warm`` steps that fill the caches."""
    threads = torch.get_num_threads()
    over = network(load) if whole else None
    what = f"{'with a network, ' if whole else ''}{threads} thread{'s' * (threads > 1)}"
    for kind in ids:
        batches = load.batches(kind, warm + rounds + 2)
        steps = {
            "fp32": Steps(load.fbgemm(), batches, over),
            "fp32, one table": Steps(load.fbgemm(one_table=True), load.in_one_table(batches), over),
            "fp16": Steps(load.fbgemm(SparseType.FP16), batches, over),
        }
        if torch.cuda.is_available():
            steps["fp32, UVM caching 5%"] = Steps(load.fbgemm(uvm_caching=0.05), batches, over)
        steps |= {name: Steps(load.cached(config), batches, over) for name, config in VARIANTS.items()}
        before: dict[str, CacheStatistics] = {}
        for name, step in steps.items():
            for _ in range(warm if name in VARIANTS else 2):
                step()
            if name in VARIANTS:
                before[name] = counted(step.tbe)
        times = interleave(steps, seconds=0, min_rounds=rounds)
        middle = medians(times)
        for name, step in steps.items():
            record: Record = {
                "section": "step",
                "case": f"step, {what}, {kind} ids, {name}",
                "variant": name,
                "ids": kind,
                "threads": threads,
                "rival": "fp32",
                "ratio": ratio(times, name, "fp32"),
                "goal": STEP_GOALS[kind] if name in VARIANTS and not whole else None,
                "ratio_to_one_table": ratio(times, name, "fp32, one table"),
                "seconds": middle[name],
                "rival_seconds": middle["fp32"],
                **vars(load),
            }
            if name in VARIANTS:
                now = counted(step.tbe) - before[name]
                shares = zip(step.prefetch_seconds[-rounds:], times[name], strict=True)
                record |= {
                    "prefetch_share": statistics.median(prefetch / whole for prefetch, whole in shares),
                    "hit_rate": now.hit_rate,
                    "conflict_unique_misses_a_step": now.num_conflict_unique_misses / (rounds + 1),
                }
            yield record


def hit_rate(rows: int, batches: Sequence[Tensor], config: CacheConfig) -> float:
    """Over the second half of the batches, of ids of one table; the rows are as narrow as FBGEMM has them."""
    tbe = Workload(1, rows, 4, 1, 1).cached(config, EmbOptimType.EXACT_SGD).train()
    before = CacheStatistics()
    for number, ids in enumerate(batches):
        if number == len(batches) // 2:
            before = counted(tbe)
        tbe(ids.to(this_device()), torch.arange(len(ids) + 1, device=this_device()))  # its graph is dropped
    return (counted(tbe) - before).hit_rate


def hits(rows: int, steps: int, prepared: Path | None) -> Iterator[Record]:
    """Hit rates by load factor: on Zipf ids, and on fields of ciao, whose log goes from user to user, as it is and
    shuffled, as it is trained."""
    load = Workload(1, rows, 4, *LOOKUPS)
    sources = {f"zipf 1.05, {math.prod(LOOKUPS)} lookups": (rows, [ids for ids, _ in load.batches("zipf", steps)])}
    if prepared is not None:
        data = PreparedDataset.open(prepared)
        sizes = {field.name: field.num_embeddings for field in data.fields}
        for order, shuffle_seed in (("in order", None), ("shuffled", 0)):
            batches = list(data.batches("train", 512, shuffle_seed=shuffle_seed, drop_last=True))
            for field in ("user", "item"):
                ids = [batch.sparse_features[field].values() for batch in batches]
                sources[f"ciao {field} {order}, 512 lookups"] = (sizes[field], ids)
    for source, (size, ids_of_batches) in sources.items():
        for factor in LOAD_FACTORS:
            rates = {a.name: hit_rate(size, ids_of_batches, CacheConfig(8, factor, a)) for a in (LRU, LFU)}
            for algorithm, rate in rates.items():
                yield {
                    "section": "hits",
                    "case": f"hits, {source}, {algorithm} {factor:g}",
                    "source": source,
                    "rows": size,
                    "algorithm": algorithm,
                    "load_factor": factor,
                    "hit_rate": rate,
                    "ratio": None,
                    "goal": None,
                }


def auc_variants(quick: bool) -> dict[str, CacheConfig | None]:
    """What is trained, by name; None is fp32."""
    if quick:
        return {"fp32": None, **{name: VARIANTS[name] for name in AUC_GOALS}}
    found: dict[str, CacheConfig | None] = {"fp32": None, AGAIN: None, **VARIANTS}
    for name in AUC_GOALS:
        found[f"{name}, nearest"] = replace(VARIANTS[name], stochastic_rounding=False)
        for dtype in ("fp32", "bf16"):
            found[f"{name}, state {dtype}"] = replace(VARIANTS[name], optimizer_state_dtype=dtype)  # type: ignore[arg-type]
    found["INT4 1% LRU, nearest"] = replace(VARIANTS["INT4 1% LRU"], stochastic_rounding=False)
    found["INT4 5% LFU"] = replace(VARIANTS["INT4 1% LFU"], load_factor=0.05)
    return found


def run_seed(work: tuple[Mapping[str, CacheConfig | None], str, int, int]) -> list[Record]:
    """Every variant with one seed, in a process of its own with one thread."""
    variants, folder, dim, seed = work
    one_quiet_thread()
    data = PreparedDataset.open(folder)
    records = []
    with process_group(torch.device("cpu")):
        for name, config in variants.items():
            method = Method.parse("fp32") if config is None else Method("cache", "cache", (), config)
            own_seed = seed + 1000 if name == AGAIN else seed
            job = Job(method, data, Settings(seed=own_seed, dim=dim, resets=0))
            records.append({**run_pipeline(job).record, "variant": name, "seed": seed})
    return records


def auc(folders: Sequence[Path], dim: int, quick: bool, processes: int) -> list[Record]:
    """Changes of the AUC to fp32 over the seeds."""
    jobs = [(auc_variants(quick), str(folder), dim, seed) for seed, folder in enumerate(folders)]
    # A fresh process each: a process group and its threads are left behind otherwise.
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        seeds = list(tqdm(pool.imap(run_seed, jobs, chunksize=1), total=len(jobs), desc=f"seeds, D={dim}"))
    return auc_records([record for records in seeds for record in records], dim)


def auc_records(runs: Sequence[Record], dim: int) -> list[Record]:
    """A record for each variant, from those of its runs."""
    reference = {run["seed"]: run["auc"] for run in runs if run["variant"] == "fp32"}
    records: list[Record] = []
    for name in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == name]
        changes = [run["auc"] - reference[run["seed"]] for run in mine]
        spread = statistics.stdev(changes) if len(changes) > 1 else None
        record: Record = {
            "section": "auc",
            "case": f"auc, {name}, D={dim}",
            "variant": name,
            "dim": dim,
            "seeds": len(mine),
            "auc": statistics.fmean(run["auc"] for run in mine),
            "change": statistics.fmean(changes),
            "change_deviation": spread,
            "change_error": None if spread is None else spread / len(changes) ** 0.5,
            "ratio": statistics.fmean(run["fp32_training_bytes"] / run["training_bytes"] for run in mine),
            "goal": AUC_GOALS.get(name),
        }
        if "hit_rate" in mine[0]:
            record["hit_rate"] = statistics.fmean(run["hit_rate"] for run in mine)
            record["change_of_flush"] = statistics.fmean(run["auc"] - run["auc_before_flush"] for run in mine)
        records.append(record)
    return records


def reached(record: Record) -> bool | None:
    """Whether the goal is: a ratio of bytes at least, of times at most, a change of AUC at least. None without goal."""
    if record["goal"] is None:
        return None
    if record["section"] == "auc":
        return bool(record["change"] >= record["goal"])
    return bool(record["ratio"] <= record["goal"] if record["section"] == "step" else record["ratio"] >= record["goal"])


def show(records: Sequence[Record]) -> None:
    """Print a table for each section."""

    def cell(record: Record, key: str, form: str, scale: float = 1.0) -> str:
        return "-" if record.get(key) is None else format(record[key] * scale, form)

    def verdict(record: Record, form: str, scale: float = 1.0) -> str:
        if record["goal"] is None:
            return "-"
        return f"{format(record['goal'] * scale, form)} {'reached' if reached(record) else 'MISSED'}"

    kinds = list(dict.fromkeys(kind for record in records for kind in record.get("bytes_by_kind", ())))
    columns: dict[str, tuple[Sequence[str], Callable[[Record], Sequence[str]]]] = {
        "memory": (
            ("memory, MB", "all", *(kind.replace("_", " ") for kind in kinds), "hit rate", "ratio", "goal"),
            lambda r: (
                f"{r['bytes'] / 1e6:.1f}",
                *(cell(r.get("bytes_by_kind", {}), kind, ".1f", 1e-6) for kind in kinds),
                cell(r, "hit_rate", ".1%"),
                f"{r['ratio']:.2f}",
                verdict(r, ".1f"),
            ),
        ),
        "step": (
            ("step", "ms", "ratio", "goal", "to one table", "prefetch", "hit rate"),
            lambda r: (
                f"{r['seconds'] * 1e3:.1f}",
                f"{r['ratio']:.2f}",
                verdict(r, ".2f"),
                f"{r['ratio_to_one_table']:.2f}",
                cell(r, "prefetch_share", ".0%"),
                cell(r, "hit_rate", ".1%"),
            ),
        ),
        "auc": (
            ("AUC", "mean", "change, 1e-4", "deviation", "error", "goal", "of flush", "hit rate", "bytes ratio"),
            lambda r: (
                f"{r['auc']:.5f}",
                cell(r, "change", "+.1f", 1e4),
                cell(r, "change_deviation", ".1f", 1e4),
                cell(r, "change_error", ".1f", 1e4),
                verdict(r, "+.0f", 1e4),
                cell(r, "change_of_flush", "+.1f", 1e4),
                cell(r, "hit_rate", ".1%"),
                f"{r['ratio']:.2f}",
            ),
        ),
    }
    for section, (head, line) in columns.items():
        chosen = [record for record in records if record["section"] == section]
        if chosen:
            print(text_table([head, *([r["case"].split(", ", 1)[1], *line(r)] for r in chosen)]), end="\n\n")
    curves: dict[str, Mapping[float, str]] = {}
    for r in records:
        if r["section"] == "hits":
            key = f"{r['source']}, {r['algorithm']}"
            curves[key] = {**curves.get(key, {}), r["load_factor"]: f"{r['hit_rate']:.1%}"}
    if curves:
        lines = [[key, *(rates[factor] for factor in LOAD_FACTORS)] for key, rates in curves.items()]
        print(text_table([["hit rate by load factor", *(f"{factor:.1%}" for factor in LOAD_FACTORS)], *lines]))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller tables, fewer variants, rounds and seeds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="parts (default: all)")
    parser.add_argument("--data", type=Path, metavar="CSV", help="ciao's user,item,category,rating")
    parser.add_argument("--dim", type=int, nargs="+", default=[16, 64], help="of the auc part (default: 16 64)")
    parser.add_argument("--seeds", type=int, default=5, help="of the auc part (default: 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of the step part (default: 1 2)")
    parser.add_argument("--processes", type=int, default=2, help="of the auc part, side by side (default: 2)")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, temporary: Path) -> Iterator[Record]:
    """The records of the chosen parts."""
    quick, data = options.quick, options.data
    seeds = min(options.seeds, 2) if quick else options.seeds
    folders = [temporary / f"seed{seed}" for seed in range(seeds if "auc" in options.only else 1)]
    if data is not None and {"auc", "hits"} & set(options.only):
        for seed, folder in enumerate(folders):
            prepare_ciao(data, folder, seed)
    if "memory" in options.only:
        yield from memory(100_000 if quick else 1_000_000, 10 if quick else 60, (16, 64) if quick else DIMS)
    if "step" in options.only:
        load = Workload(8, 100_000 if quick else 1_000_000, 64, *LOOKUPS)
        for threads in options.threads:
            torch.set_num_threads(threads)
            yield from step_times(load, *((15, 8) if quick else (60, 40)), ids=("zipf", "uniform") if quick else IDS)
            if not quick:
                yield from step_times(load, 60, 20, ids=("zipf", "uniform"), whole=True)
        torch.set_num_threads(1)
    if "hits" in options.only:
        rows, steps = (100_000, 20) if quick else (1_000_000, 200)
        yield from hits(rows, steps, folders[0] if data is not None else None)
    if "auc" in options.only and data is not None:
        for dim in options.dim[:1] if quick else options.dim:
            yield from auc(folders, dim, quick, options.processes)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    if not torch.cuda.is_available():
        print("FBGEMM's UVM caching needs a CUDA GPU and is left out")
    if options.data is None:
        print("no --data: AUC and ciao's hit rates are left out")
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as temporary:
        for record in tqdm(measure(options, Path(temporary)), desc="cases"):
            records.append({**record, "reached": reached(record)})
    if options.json:
        write_json(options.json, records)
    show(records)


if __name__ == "__main__":
    main()
