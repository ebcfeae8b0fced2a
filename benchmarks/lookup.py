"""How fast packed tables are looked up on the CPU: against FBGEMM's quantized TBE and nn.EmbeddingBag.

    python benchmarks/lookup.py               # 10 minutes, up to 12 GB of memory
    python benchmarks/lookup.py --quick       # within one minute: 100,000 rows a table, pooling factor 10

One process, one thread, 26 equal tables, B=2048, SUM, float32 output, int32 ids, bounds checks off on both sides. Ours
has ranked tables of one bit-width, or of the mixes below; rivals are FBGEMM's IntNBit TBE (INT8, INT4, INT2, FP16) and
26 nn.EmbeddingBag modules in fp32, whose outputs stay 26 tensors. Ids are in frequency order, so that zipf ids (of
exponent 1.05) are dense in the first rows of every rival's tables too.

Each round calls a rival and the widths compared with it once each, every one on another of 4 index sets than the round
before. A ratio is the median over the rounds of rival time / our time: above 1, ours is faster. Goals hold for one
thread and AVX-512 VBMI; with AVX2 the same ratios are measured in rounds of their own.

Every call allocates its output. Whether malloc hands it pages that the process still has depends on what was freed
before, so it is told: L=1 gets new pages from the system each time, which then take most of the time; all else gets
pages in use before. L=1 with out= has each of ours write to a tensor of its own.

Rows of the 26 tables hold the same values at memory of their own. Only fp32 tables share theirs, where they would be
larger than 7 GB together: D=128 with 1,000,000 rows, 13 different tables. That does the rival no harm.
"""

import argparse
import ctypes
import gc
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from coded_tables import EIGHTFOLD, HUNDREDFOLD, coded_table
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode as FbgemmBoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from measure import interleave, medians, ratio, versions, write_json
from torch import Tensor
from tqdm import tqdm

from torchrec_mpe.files.text_table import text_table
from torchrec_mpe.ops import library
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.packed_embedding_bag import packed_embedding_bag
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.layout import END_PADDING
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.packing.packed_tables import PackedTables

TABLES, BATCH, INDEX_SETS, HOT_IDS = 26, 2048, 4, 40
DIMS = (16, 64, 128)
ZIPF = 1.05
FP32_BYTES = 7e9
"""What the tables of nn.EmbeddingBag take at most; more of them share their weights."""

Shares = tuple[tuple[float, int], ...]

SHARES: dict[str, Shares] = {
    **{str(bits): ((1.0, bits),) for bits in (8, 4, 3, 2, 1)},
    "mixA": ((0.05, 6), (0.10, 4), (0.25, 2), (0.16, 1), (0.44, 0)),
    "mixB": ((0.01, 4), (0.02, 2), (0.06, 1), (0.91, 0)),
}
"""Share of a table's rows of each bit-width, the most frequent first; the mixes have 1.36 and 0.14 bits a row."""

FP32 = "EmbeddingBag fp32"
COMPARED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("8",): ("INT8", "FP16", FP32),
    ("4", "3", "mixA", "mixB", HUNDREDFOLD, EIGHTFOLD): ("INT4",),
    ("2", "1"): ("INT2",),
}
"""Widths that are timed together, to the rivals that each is compared with."""

RIVALS = tuple(rival for rivals in COMPARED.values() for rival in rivals)
WIDTHS = tuple(bits for widths in COMPARED for bits in widths)

Goals = Mapping[tuple[str, str], tuple[float, ...] | None]
"""Widths and rival that are shown, to the ratio to reach for each of DIMS, or None."""

MEAN_GOALS: Goals = {
    ("8", "INT8"): (1.15, 1.25, 1.15),
    ("8", "FP16"): None,
    ("8", FP32): (1.2, 1.6, 1.7),
    ("4", "INT4"): (1.4, 1.5, 1.25),
    ("3", "INT4"): (1.4, 1.5, 1.25),
    ("2", "INT2"): (1.5, 1.4, 1.9),
    ("1", "INT2"): (1.7, 1.6, 2.2),
    ("mixA", "INT4"): (1.5, 1.9, 1.5),
    ("mixB", "INT4"): None,
    (HUNDREDFOLD, "INT4"): (2.5, 3.0, 3.5),
    (EIGHTFOLD, "INT4"): (1.3, 1.3, 1.3),
}
HOT_GOALS: Goals = {
    ("8", "INT8"): (0.7, 0.9, 1.0),
    ("4", "INT4"): (0.85, 1.0, 1.15),
    ("2", "INT2"): (1.15, 1.2, 1.35),
}
SINGLE_GOALS: Goals = dict.fromkeys(HOT_GOALS, (1.15, 0.9, 1.0))


@dataclass(frozen=True)
class Cell:
    """Rows of each table, how ids are drawn, and the pooling factor; ``out``: ours writes to a given output."""

    rows: int
    ids: str
    length: int
    out: bool = False

    @property
    def name(self) -> str:
        return f"{self.rows:,} rows, {self.ids}, L={self.length}{', out=' if self.out else ''}"


GRID = tuple(
    Cell(rows, ids, length) for rows in (100_000, 1_000_000) for ids in ("zipf", "uniform") for length in (10, 40)
)
QUICK_GRID = tuple(cell for cell in GRID if cell.rows == 100_000 and cell.length == 10)
HOT = Cell(100_000, "hot", 40)
SINGLE = Cell(100_000, "uniform", 1)
SINGLE_OUT = replace(SINGLE, out=True)

Record = dict[str, Any]
Pace = tuple[float, int]  # seconds of a comparison, and rounds at least
Call = Callable[[Tensor, Tensor], object]


def draw_ids(rows: int, kind: str, count: int, generator: torch.Generator) -> Tensor:
    """int32 [count] row ids: "uniform", "hot" (of 40 rows) or "zipf" (by the inverse of a continuous distribution)."""
    if kind != "zipf":
        return torch.randint(HOT_IDS if kind == "hot" else rows, (count,), generator=generator, dtype=torch.int32)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    power = 1 - ZIPF
    ids = (1 - uniform * (1 - float(rows + 1) ** power)) ** (1 / power) - 1
    return ids.int().clamp_(0, rows - 1)


@cache
def index_sets(rows: int, kind: str, length: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Ids and offsets, int32, of a few batches."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.arange(0, TABLES * BATCH * length + 1, length, dtype=torch.int32)
    return tuple((draw_ids(rows, kind, TABLES * BATCH * length, generator), offsets) for _ in range(INDEX_SETS))


def keep_freed_memory(keep: bool) -> None:
    """Tell glibc's malloc whether to keep what outputs took, or to return it; other C libraries go by their own rules.

    What is kept stays in use after a later False.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 1 << 30 if keep else 128 << 10)
        mallopt(mmap_threshold, 32 << 20 if keep else 128 << 10)


def tables_of(bits: str, rows: int, dim: int) -> PackedTables:
    """26 ranked tables by the name of their widths or coding."""
    if bits in SHARES:
        return packed_tables(rows, dim, SHARES[bits])
    return repeated(coded_table(rows, dim, bits), TABLES)


def packed_tables(rows: int, dim: int, shares: Shares, directory: str = "ranked") -> PackedTables:
    """26 tables with rows of the given widths by frequency; ids are in order, or permuted ones for a directory."""
    generator = torch.Generator().manual_seed(0)
    bounds = [round(rows * total) for total in itertools.accumulate((share for share, _ in shares), initial=0.0)]
    ranks = None if directory == "ranked" else torch.randperm(rows, generator=generator).int()
    alpha = torch.tensor([0.0, *(2 / 2 ** (bits - 1) for bits in range(1, 9))])
    source = torch.randn(rows, dim, generator=generator)
    table = TableToPack(
        "t",
        TableBitWidths(rows, dim, tuple(bounds), tuple(bits for _, bits in shares), ranks),
        lambda start, stop: source[start:stop],
        alpha,
        torch.randn(dim, generator=generator) / 10,
        torch.randn(dim, generator=generator),
        directory,
    )
    return repeated(pack_tables([table]), TABLES)


def repeated(packed: PackedTables, count: int) -> PackedTables:
    """The only table ``count`` times, each at bytes of its own: quantizing 26 tables would take most of the time."""
    table, steps = packed.tables[0], torch.arange(count)
    size, lines = packed.weights.numel() - END_PADDING, packed.directory.numel()
    weights = torch.zeros(count * size + END_PADDING, dtype=torch.uint8)
    weights[: count * size].view(count, size).copy_(packed.weights[:size])
    runs, zero_row = packed.run_starts.numel(), packed.zero_rows.numel()
    is_coded = packed.components_of(0) is not None
    return replace(
        packed,
        tables=tuple(replace(table, name=f"t{t}") for t in range(count)),
        weights=weights,
        weights_offsets=steps * size,
        rows_per_table=packed.rows_per_table.repeat(count),
        run_records=packed.run_records.repeat(count, 1),
        run_starts=packed.run_starts.repeat(count),
        run_offsets=(torch.arange(count + 1) * runs).int(),
        directory_kinds=packed.directory_kinds.repeat(count),
        directory=packed.directory.repeat(count),
        directory_offsets=steps * lines if lines else packed.directory_offsets.repeat(count),
        scale_index=packed.scale_index.repeat(count),
        zero_rows=packed.zero_rows.repeat(count),
        zero_row_offsets=(steps * zero_row).int() if zero_row else packed.zero_row_offsets.repeat(count),
        levels=packed.levels.repeat(count),
        levels_offsets=(steps * packed.levels.numel()).int() if is_coded else packed.levels_offsets.repeat(count),
        bases=packed.bases.repeat(count),
        bases_offsets=(steps * packed.bases.numel()).int() if is_coded else packed.bases_offsets.repeat(count),
        components=packed.components.repeat(count),
    )


def our_lookup(packed: PackedTables) -> Callable[..., Tensor]:
    """A call with ids, offsets, and perhaps ``out`` and ``backend``."""
    tables, dim = len(packed.tables), packed.tables[0].embedding_dim
    bags = [dim * t for t in range(tables + 1)], list(range(tables)), [0] * tables
    tensors = list(packed.tensors().values())

    def call(ids: Tensor, offsets: Tensor, **chosen: Any) -> Tensor:
        options = None, torch.float32, BoundsCheckMode.NONE
        return packed_embedding_bag(*tensors, *bags, ids, offsets, *options, **chosen)

    return call


def verify(name: str, packed: PackedTables) -> None:
    """Compare with the reference op on a few bags.

    Raises:
        AssertionError: naming what is looked up, if they differ.
    """
    call, table = our_lookup(packed), packed.tables[0]
    batch, length = 4, 7
    generator = torch.Generator().manual_seed(1)
    ids = draw_ids(table.num_embeddings, "uniform", len(packed.tables) * batch * length, generator)
    offsets = torch.arange(0, ids.numel() + 1, length, dtype=torch.int32)
    expected = call(ids, offsets, backend="reference")
    for used in capabilities():
        wrong = f"{name} with {used}: not what the reference op says: ".__add__
        with library.use_cpu_capability(used):
            actual = call(ids, offsets)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4, msg=wrong)


def fbgemm_lookup(rows: int, dim: int, data_type: str) -> Call:
    """FBGEMM's IntNBit TBE, 26 tables of random rows."""
    kind = getattr(SparseType, data_type)
    specs = [(f"t{t}", rows, dim, kind, EmbeddingLocation.HOST) for t in range(TABLES)]
    tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
        specs,
        output_dtype=SparseType.FP32,
        bounds_check_mode=FbgemmBoundsCheckMode.NONE,
        device="cpu",
        pooling_mode=PoolingMode.SUM,
    )
    tbe.initialize_weights()
    generator = torch.Generator().manual_seed(0)
    tables = [rows_and_scales for rows_and_scales, _ in tbe.split_embedding_weights(split_scale_shifts=False)]
    if data_type == "FP16":
        tables[0].copy_(torch.randn(rows, dim, generator=generator).half().view(torch.uint8))
    else:
        tables[0].copy_(torch.randint(256, tables[0].shape, generator=generator, dtype=torch.uint8))
        tables[0][:, :4] = torch.tensor([0.01, -0.1], dtype=torch.float16).view(torch.uint8)  # scale, bias
    for table in tables[1:]:
        table.copy_(tables[0])
    return tbe


def fp32_lookup(rows: int, dim: int) -> Call:
    """26 nn.EmbeddingBag modules; see the top of this file for the largest tables."""
    distinct = max(1, min(TABLES, int(FP32_BYTES / (rows * dim * 4))))
    weights = [torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))]
    weights += [weights[0].clone() for _ in range(distinct - 1)]
    made = partial(torch.nn.EmbeddingBag, rows, dim, mode="sum", include_last_offset=True)
    bags = [made(_weight=weights[t % distinct]) for t in range(TABLES)]

    def call(ids: Tensor, offsets: Tensor) -> list[Tensor]:
        batch = (offsets.numel() - 1) // TABLES
        size = ids.numel() // TABLES
        return [bag(ids[t * size : (t + 1) * size], offsets[: batch + 1]) for t, bag in enumerate(bags)]

    return call


def rotating(call: Call, sets: Sequence[tuple[Tensor, Tensor]], first: int) -> Callable[[], object]:
    """The call on the next index set each time, from set ``first`` on, so that neighbours in a round differ."""
    sequence = itertools.cycle([*sets[first % len(sets) :], *sets[: first % len(sets)]])
    return lambda: call(*next(sequence))


def comparison(
    case: str, dim: int, bits: str, rival: str, times: Mapping[str, list[float]], ours: str, theirs: str, ids: int
) -> Record:
    """What is written for ``ours`` against ``theirs``, two names in the times of batches of ``ids``; no goal yet."""
    middle = medians(times)
    return {
        "case": case,
        "dim": dim,
        "bits": bits,
        "rival": rival,
        "ratio": ratio(times, theirs, ours),
        "goal": None,
        "ns": middle[ours] / ids * 1e9,
        "rival_ns": middle[theirs] / ids * 1e9,
        "threads": torch.get_num_threads(),
        "capability": library.cpu_capability(),
    }


def compare(
    cell: Cell, dim: int, rival: str, rival_call: Call, ours: Mapping[str, Callable[..., Tensor]], pace: Pace
) -> list[Record]:
    """Time a rival and ours in turns: a record for each width and instruction set.

    Instruction sets have rounds of their own: nobody follows a call that left the same table in the caches.
    """
    sets, ids = index_sets(cell.rows, cell.ids, cell.length), TABLES * BATCH * cell.length
    records: list[Record] = []
    for used in capabilities():
        calls: dict[str, Call] = {rival: rival_call}
        for bits, call in ours.items():
            calls[bits] = partial(call, out=torch.empty(BATCH, TABLES * dim)) if cell.out else call
        turns = {name: rotating(call, sets, k) for k, (name, call) in enumerate(calls.items())}
        with library.use_cpu_capability(used):
            times = interleave(turns, pace[0] / len(capabilities()), pace[1])
            records += [comparison(cell.name, dim, bits, rival, times, bits, rival, ids) for bits in ours]
    return records


def capabilities() -> tuple[str, ...]:
    """The machine's instruction set, and AVX2 beside AVX-512."""
    native = library.cpu_capability()
    return (native, "avx2") if native == "avx512" else (native,)


def measure_cells(cells: Sequence[Cell], pace: Pace) -> Iterator[list[Record]]:
    """The records of each cell, dimension and rival; tables of one size and rival at a time are in memory."""
    for dim in DIMS:
        for rows, group in itertools.groupby(sorted(cells, key=lambda cell: cell.rows), lambda cell: cell.rows):
            of_size = list(group)
            for widths, rivals in COMPARED.items():
                ours: dict[str, Callable[..., Tensor]] = {}
                for bits in widths:
                    packed = tables_of(bits, rows, dim)
                    verify(f"{bits} bits", packed)
                    ours[bits] = our_lookup(packed)
                del packed
                for rival in rivals:
                    call = fp32_lookup(rows, dim) if rival == FP32 else fbgemm_lookup(rows, dim, rival)
                    for cell in of_size:
                        yield compare(cell, dim, rival, call, ours, pace)
                    del call
                    gc.collect()  # modules hold themselves in cycles


def measure_threads(pace: Pace) -> Record:
    """Ours with two threads against one: D=64, 8 bits."""
    cell = Cell(100_000, "uniform", 40)
    call = our_lookup(packed_tables(cell.rows, 64, SHARES["8"]))
    before = torch.get_num_threads()

    def with_threads(threads: int) -> Call:
        def run(ids: Tensor, offsets: Tensor) -> object:
            torch.set_num_threads(threads)
            return call(ids, offsets)

        return run

    sets = index_sets(cell.rows, cell.ids, cell.length)
    times = interleave({f"{n}": rotating(with_threads(n), sets, n) for n in (1, 2)}, *pace)
    torch.set_num_threads(before)
    case, ids = f"two threads, {cell.name}", TABLES * BATCH * cell.length
    return {**comparison(case, 64, "8", "one thread", times, "2", "1", ids), "threads": 2}


def measure_directories(rows: int, pace: Pace) -> list[Record]:
    """Ours by every directory kind against INT4, D=16, uniform ids, which a permutation leaves uniform."""
    dim, cell = 16, Cell(rows, "uniform", 10)
    shares_of = dict.fromkeys(("ranked", "remap", "nibble"), ("mixA", SHARES["mixA"]))
    shares_of["bitmap"] = ("0/4", ((0.5, 4), (0.5, 0)))
    ours: dict[str, Callable[..., Tensor]] = {}
    for kind, (_, shares) in shares_of.items():
        packed = packed_tables(rows, dim, shares, kind)
        verify(f"{kind} directory", packed)
        ours[kind] = our_lookup(packed)
    records = compare(cell, dim, "INT4", fbgemm_lookup(rows, dim, "INT4"), ours, pace)
    return [{**r, "case": f"{r['bits']} directory, {cell.name}", "bits": shares_of[r["bits"]][0]} for r in records]


def summary(records: Sequence[Record], case: str, cells: Sequence[Cell], goals: Goals, judge: bool) -> list[Record]:
    """Geometric means over the cells by dimension, widths, rival and instruction set, of what has a key in ``goals``.

    Args:
        records (Sequence[Record]): of :func:`compare`.
        case (str): what the means are called.
        cells (Sequence[Cell]): to average.
        goals (Goals): what to show, and what to reach.
        judge (bool): whether goals hold here; else, and with AVX2, they are None.
    """
    names = {cell.name for cell in cells}
    found: dict[tuple[Any, ...], list[Record]] = {}
    for one in records:
        if one["case"] in names and (one["bits"], one["rival"]) in goals:
            found.setdefault((one["dim"], one["bits"], one["rival"], one["capability"]), []).append(one)
    means: list[Record] = []
    for (dim, bits, rival, capability), group in found.items():
        goal = goals[(bits, rival)] if judge and capability == "avx512" else None
        averages = {k: statistics.geometric_mean([one[k] for one in group]) for k in ("ratio", "ns", "rival_ns")}
        goal_here = None if goal is None else goal[DIMS.index(dim)]
        means.append({**group[0], "case": case, **averages, "goal": goal_here})
    return means


def verdict(record: Record) -> str:
    """ "reached" or "missed"; empty without a goal."""
    return "" if record["goal"] is None else "reached" if record["ratio"] >= record["goal"] else "missed"


def cells_table(records: Sequence[Record], native: str) -> str:
    """ns a row, a line per dimension and cell."""
    ns: dict[tuple[int, str], dict[str, float]] = {}
    for record in records:
        if record["capability"] == native:
            line = ns.setdefault((record["dim"], record["case"]), {})
            line[record["rival"]] = record["rival_ns"]
            line.setdefault(record["bits"], record["ns"])
    head = ["ns a row", "D", *(rival.replace("EmbeddingBag ", "") for rival in RIVALS), *WIDTHS]
    return text_table(
        [head, *([case, str(dim), *(f"{line[k]:.1f}" for k in (*RIVALS, *WIDTHS))] for (dim, case), line in ns.items())]
    )


def ratios_table(means: Sequence[Record], native: str) -> str:
    """Ratio, goal, verdict and the ratio with AVX2 for each dimension, a line per case, widths and rival."""
    lines = [["rival time / our time", "bits", "rival"]]
    for dim in DIMS:
        lines[0] += [f"D={dim}", "goal", "", "avx2"]
    by_key = {(r["case"], r["bits"], r["rival"], r["dim"], r["capability"]): r for r in means}
    for case, bits, rival in dict.fromkeys((r["case"], r["bits"], r["rival"]) for r in means):
        line = [case, bits, rival]
        for dim in DIMS:
            record = by_key[(case, bits, rival, dim, native)]
            restrained = by_key.get((case, bits, rival, dim, "avx2"))
            goal = f"{record['goal']:.2f}" if record["goal"] is not None else "-"
            line += [
                f"{record['ratio']:.2f}",
                goal,
                verdict(record),
                f"{restrained['ratio']:.2f}" if restrained else "-",
            ]
        lines.append(line)
    return text_table(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 rows a table, pooling factor 10, fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="of all rivals and ours (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    return options


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if not library.is_loaded():
        sys.exit(f"lookup.py measures the compiled op: {library.problem()}")
    torch.set_num_threads(options.threads)
    native = library.cpu_capability()
    grid, pace, long = (QUICK_GRID, (0.1, 3), (0.5, 7)) if options.quick else (GRID, (1.2, 7), (5.0, 7))
    print(", ".join(f"{name} {value}" for name, value in versions().items()))

    records: list[Record] = []
    with tqdm(desc="lookups", total=len(DIMS) * len(RIVALS) * (len(grid) + 3)) as progress:
        # Memory once kept would serve outputs that are meant to be new.
        for keep, cells in ((False, (SINGLE,)), (True, (*grid, HOT, SINGLE_OUT))):
            keep_freed_memory(keep)
            for group in measure_cells(cells, pace):
                records += group
                progress.update()
    directories = measure_directories(100_000 if options.quick else 1_000_000, long)
    scaling = measure_threads(long)

    judge = options.threads == 1
    mean = f"mean of {len(grid)} cells" + (" (quick)" if options.quick else "")
    means = summary(records, mean, grid, MEAN_GOALS, judge)
    means += summary(records, f"hot: {HOT_IDS} ids, L={HOT.length}", [HOT], HOT_GOALS, judge)
    means += summary(records, "L=1, new outputs", [SINGLE], SINGLE_GOALS, judge)
    means += summary(records, "L=1, ours with out=", [SINGLE_OUT], SINGLE_GOALS, judge)

    print(cells_table(records, native), end="\n\n")
    if options.quick:
        print(f"Quick run: {grid[0].rows:,} rows and L={grid[0].length} only. Goals are meant for the whole grid.")
    print(ratios_table(means, native), end="\n\n")
    speedup = (
        f"{scaling['rival_ns']:.1f} ns a row with 1 thread, {scaling['ns']:.1f} with 2: {scaling['ratio']:.2f} times"
    )
    print(f"D=64, 8 bits: {speedup} as fast", end="\n\n")
    lines = [["row directory, D=16", "bits", "ns a row", "INT4 on permuted ids", "ratio"]]
    for record in directories:
        if record["capability"] == native:
            ns = [f"{record[field]:.1f}" for field in ("ns", "rival_ns")]
            lines.append([record["case"], record["bits"], *ns, f"{record['ratio']:.2f}"])
    print(text_table(lines))
    if options.json:
        write_json(options.json, [*means, scaling, *directories, *records])


if __name__ == "__main__":
    main()
