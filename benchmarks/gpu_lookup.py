"""How fast packed tables are looked up on a GPU: against the memory's floor, FBGEMM and nn.EmbeddingBag.

    python benchmarks/gpu_lookup.py               # FBGEMM's default case, and B=2048 T=26 E=1e6 at D=16, 64, 128
    python benchmarks/gpu_lookup.py --quick       # FBGEMM's default case and D=64 at E=1e5, in a minute

Uniform ids, pooling factor 20, SUM, float32 output, int32 ids, bounds checks off on all sides, every op with an output
of its own choosing. Each round runs every op once on the same ids, those of another index set than the round before,
after overwriting 256 MiB, so that the L2 cache holds neither rows nor ids. Times are medians of CUDA events.

The floor of a lookup is what it must move at the speed of a device-to-device copy of 1 GiB: every 32-byte sector that
holds a byte of a row in the batch, once, ids, offsets and output. "of floor" is floor / time. FBGEMM's rows are counted
the same way, with scale, bias and padding. Each case is first verified against the reference op on a few bags.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import write_json
from torch import Tensor

SECTOR = 32
FLUSH_BYTES = 256 << 20
POOLING_FACTOR = 20
MIX = ((0.05, 6), (0.15, 4), (0.40, 2), (1.00, 0))
"""Shares of the ranks up to which rows have a bit-width: 1.2 bits on average."""

WIDTHS: dict[str, tuple[tuple[float, int], ...]] = {
    "8": ((1.0, 8),),
    "4": ((1.0, 4),),
    "2": ((1.0, 2),),
    "1": ((1.0, 1),),
    "mix": MIX,
}
RIVALS = {"8": ("INT8", "EmbeddingBag"), "4": ("INT4",), "2": ("INT2",), "1": ("INT2",), "mix": ("INT4",)}
FLOOR_GOAL = 0.7
"""Share of the floor's speed to reach on dimensions of 64 and more."""


@dataclass(frozen=True)
class Case:
    """One set of equal tables: batch size, tables, rows of each and embedding dimension."""

    batch: int
    tables: int
    rows: int
    dim: int

    @property
    def name(self) -> str:
        return f"B={self.batch} T={self.tables} L={POOLING_FACTOR} E={self.rows:.0e}"


FBGEMM_DEFAULT = Case(512, 32, 100_000, 128)
CASES = (FBGEMM_DEFAULT, *(Case(2048, 26, 1_000_000, dim) for dim in (16, 64, 128)))
QUICK_CASES = (FBGEMM_DEFAULT, Case(2048, 26, 100_000, 64))


@dataclass(frozen=True)
class Runs:
    """The runs of a ranked table: first rank, bit-width, bytes of a row and first byte of each."""

    firsts: tuple[int, ...]
    bits: tuple[int, ...]
    row_bytes: tuple[int, ...]
    bases: tuple[int, ...]
    table_bytes: int


def ranked_runs(rows: int, dim: int, shares: Sequence[tuple[float, int]]) -> Runs:
    """Where the rows of one table lie, runs and the table's end at multiples of 64 bytes."""
    firsts, bits, row_bytes, bases = [], [], [], []
    first, end = 0, 0
    for share, width in shares:
        stop = round(rows * share)
        firsts.append(first)
        bits.append(width)
        row_bytes.append(-(-dim // 8) * width)
        bases.append(end if width else 0)
        end += -(-(stop - first) * row_bytes[-1] // 64) * 64
        first = stop
    return Runs(tuple(firsts), tuple(bits), tuple(row_bytes), tuple(bases), end)


def distinct_sectors(starts: Tensor, sizes: Tensor) -> int:
    """Distinct 32-byte sectors that hold a byte of ``[starts, starts + sizes)``, int64 tensors of one shape."""
    starts, sizes = starts[sizes > 0], sizes[sizes > 0]
    if starts.numel() == 0:
        return 0
    first, last = starts // SECTOR, (starts + sizes - 1) // SECTOR
    steps = torch.arange(int((last - first).max()) + 1, device=starts.device)
    sectors = first.unsqueeze(1) + steps
    return int(sectors[sectors <= last.unsqueeze(1)].unique().numel())


def floor_bytes(row_sectors: int, ids: int, bags: int, outputs: int) -> int:
    """Bytes a lookup must move: sectors of rows, int32 ids and offsets, float32 outputs."""
    return row_sectors * SECTOR + 4 * ids + 4 * (bags + 1) + 4 * outputs


class Lookups:
    """The ops of one case by name, and the bytes that each must move."""

    def __init__(self, case: Case, index_sets: int, seed: int = 0) -> None:
        self.case = case
        self.generator = torch.Generator(device="cuda").manual_seed(seed)
        bags = case.tables * case.batch
        self.offsets = torch.arange(bags + 1, dtype=torch.int32, device="cuda") * POOLING_FACTOR
        shape = (index_sets, bags * POOLING_FACTOR)
        self.ids = torch.randint(case.rows, shape, dtype=torch.int32, device="cuda", generator=self.generator)
        self.columns = [t * case.dim for t in range(case.tables + 1)]
        self.features = list(range(case.tables))
        self.run: dict[str, Callable[[Tensor], object]] = {}
        self.bytes: dict[str, int] = {}
        for label, shares in WIDTHS.items():
            self._add_packed(label, shares)
        for name in ("INT8", "INT4", "INT2"):
            self._add_fbgemm(name)
        self._add_embedding_bag()

    def _table_of_id(self) -> Tensor:
        return torch.arange(self.case.tables, device="cuda").repeat_interleave(self.case.batch * POOLING_FACTOR)

    def _floor(self, starts: Tensor, sizes: Tensor) -> int:
        """Of the first index set; ``starts`` lie in each id's own table, which share no sectors."""
        table_bytes = int((starts + sizes).max()) // SECTOR * SECTOR + SECTOR
        sectors = distinct_sectors(starts + self._table_of_id() * table_bytes, sizes)
        bags = self.case.tables * self.case.batch
        return floor_bytes(sectors, starts.numel(), bags, bags * self.case.dim)

    def _add_packed(self, label: str, shares: Sequence[tuple[float, int]]) -> None:
        from torchrec_mpe.ops.directory import Directory
        from torchrec_mpe.ops.packed_embedding_bag import packed_embedding_bag

        case, runs = self.case, ranked_runs(self.case.rows, self.case.dim, shares)
        tables, count = case.tables, len(runs.firsts)

        def cuda(values: Any, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device="cuda")

        first_bytes = [
            base - first * size for first, size, base in zip(runs.firsts, runs.row_bytes, runs.bases, strict=True)
        ]
        records = [
            (8 * start, 8 * size | width << 32) if width else (0, 0)
            for start, width, size in zip(first_bytes, runs.bits, runs.row_bytes, strict=True)
        ]
        size = tables * runs.table_bytes + 64
        weights = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda", generator=self.generator)
        packed = (
            weights,
            cuda([t * runs.table_bytes for t in range(tables)], torch.int64),
            cuda([case.rows] * tables, torch.int32),
            cuda(records * tables, torch.int64),
            cuda(runs.firsts * tables, torch.int32),
            cuda([t * count for t in range(tables + 1)], torch.int32),
            cuda([int(Directory.RANKED)] * tables, torch.int32),
            torch.empty(0, dtype=torch.uint8, device="cuda"),
            cuda([-1] * tables, torch.int64),
            cuda([[0, *(0.01 / 2**b for b in range(1, 9))]], torch.float32),
            torch.randn(case.dim, device="cuda", generator=self.generator) * 0.01,
            cuda([0], torch.int32),
            cuda([0] * tables, torch.int32),
            torch.randn(tables * case.dim, device="cuda", generator=self.generator) * 0.01,
            cuda([t * case.dim for t in range(tables)], torch.int32),
            # No table is coded.
            torch.empty(0, dtype=torch.bfloat16, device="cuda"),
            cuda([-1] * tables, torch.int32),
            torch.empty(0, dtype=torch.float16, device="cuda"),
            cuda([-1] * tables, torch.int32),
            cuda([0] * tables, torch.int32),
        )
        shape = (self.columns, self.features, [0] * tables)

        def lookup(ids: Tensor, offsets: Tensor = self.offsets, backend: str = "triton") -> Tensor:
            arguments = (ids, offsets, None, torch.float32, 3, None)
            return packed_embedding_bag(*packed, *shape, *arguments, backend=backend)

        self._verify(label, lookup)
        self.run[label] = lookup
        ids = self.ids[0].long()
        run = torch.searchsorted(cuda(runs.firsts, torch.int64), ids, right=True) - 1
        sizes = cuda(runs.row_bytes, torch.int64)[run]
        starts = cuda(first_bytes, torch.int64)[run] + ids * sizes
        self.bytes[label] = self._floor(starts, sizes)

    def _verify(self, label: str, lookup: Callable[..., Tensor]) -> None:
        """Compare with the reference on 4 bags of each table; the packed bytes are random, so all codes occur."""
        offsets = torch.arange(4 * self.case.tables + 1, dtype=torch.int32, device="cuda") * POOLING_FACTOR
        ids = self.ids[0][: 4 * self.case.tables * POOLING_FACTOR]
        ours, reference = lookup(ids, offsets), lookup(ids, offsets, "reference")
        try:
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
        except AssertionError as error:
            sys.exit(f"error: {self.case.name} D={self.case.dim} {label} bits differs from the reference: {error}")

    def _add_fbgemm(self, name: str) -> None:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

        case = self.case
        spec = ("", case.rows, case.dim, SparseType[name], EmbeddingLocation.DEVICE)
        tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
            [spec] * case.tables,
            device=torch.device("cuda"),
            bounds_check_mode=BoundsCheckMode.NONE,
            output_dtype=SparseType.FP32,
        )
        tbe.fill_random_weights()
        self.run[name] = lambda ids: tbe(ids, self.offsets)
        row_bytes = tbe.split_embedding_weights()[0][0].shape[1]
        stride = -(-row_bytes // 16) * 16  # rows are padded to 16 bytes on CUDA
        ids = self.ids[0].long()
        self.bytes[name] = self._floor(ids * stride, torch.full_like(ids, stride))

    def _add_embedding_bag(self) -> None:
        case = self.case
        bag = torch.nn.EmbeddingBag(case.tables * case.rows, case.dim, mode="sum", device="cuda")
        bag.weight.requires_grad_(False)
        first_row = (self._table_of_id() * case.rows).int()
        ids_of_set = {self.ids[s].data_ptr(): self.ids[s] + first_row for s in range(len(self.ids))}
        # One table of all rows: one launch, as for the others. Its output is [T * B, D], as many bytes.
        self.run["EmbeddingBag"] = lambda ids: bag(ids_of_set[ids.data_ptr()], self.offsets[:-1])
        ids = self.ids[0].long()
        self.bytes["EmbeddingBag"] = self._floor(ids * case.dim * 4, torch.full_like(ids, case.dim * 4))


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device-to-device copy of 1 GiB; the median of 20."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = _seconds([lambda: target.copy_(source)] * 20, lambda: None)
    return 2 * source.numel() / statistics.median(seconds)


def _seconds(calls: Sequence[Callable[[], object]], flush: Callable[[], object]) -> list[float]:
    """Device seconds of each call; flushes before each, which also keeps the device busy while the call is launched."""
    events = []
    for call in calls:
        flush()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def measure_case(case: Case, rounds: int, bandwidth: float) -> list[dict[str, Any]]:
    """A case's results: an object per width and rival, the floor among the rivals."""
    lookups = Lookups(case, index_sets=8)
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    names = list(lookups.run)
    sets = list(lookups.ids)
    for name in names:
        for _ in range(3):
            lookups.run[name](sets[0])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        ids = sets[turn % len(sets)]
        calls = [lambda name=name, ids=ids: lookups.run[name](ids) for name in names]  # type: ignore[misc]
        for name, value in zip(names, _seconds(calls, scratch.zero_), strict=True):
            seconds[name].append(value)
    return results(case, {name: statistics.median(times) for name, times in seconds.items()}, lookups.bytes, bandwidth)


def results(case: Case, seconds: dict[str, float], moved: dict[str, int], bandwidth: float) -> list[dict[str, Any]]:
    """An object per width and rival; ``ratio`` is how many times faster than the rival, or the share of the floor."""
    rows: list[dict[str, Any]] = []
    for bits, rivals in RIVALS.items():
        floor = moved[bits] / bandwidth
        for rival in ("floor", *rivals):
            rival_seconds = floor if rival == "floor" else seconds[rival]
            goal = (FLOOR_GOAL if case.dim >= 64 else None) if rival == "floor" else 1.0
            rows.append(
                {
                    "case": case.name,
                    "dim": case.dim,
                    "bits": bits,
                    "rival": rival,
                    "ratio": rival_seconds / seconds[bits],
                    "goal": goal,
                    "microseconds": seconds[bits] * 1e6,
                    "rival_microseconds": rival_seconds * 1e6,
                    "bytes": moved[bits],
                    "rival_bytes": None if rival == "floor" else moved[rival],
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as text, a line each."""
    lines = [f"{'case':27} {'D':>4} {'bits':>4} {'us':>8} {'MB':>7}  {'rival':12} {'us':>8} {'ratio':>6} {'goal':>5}"]
    for row in rows:
        goal = "" if row["goal"] is None else f"{row['goal']:.2f}"
        lines.append(
            f"{row['case']:27} {row['dim']:4} {row['bits']:>4} {row['microseconds']:8.1f} {row['bytes'] / 1e6:7.1f}  "
            f"{row['rival']:12} {row['rival_microseconds']:8.1f} {row['ratio']:6.2f} {goal:>5}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases of 100,000 rows a table, fewer rounds")
    parser.add_argument("--rounds", type=int, default=100, help="runs of every op (default: 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_lookup.py measures on a CUDA GPU, and torch sees none here", file=sys.stderr)
        sys.exit(2)
    cases, rounds = (QUICK_CASES, min(options.rounds, 30)) if options.quick else (CASES, options.rounds)

    gpu = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth()
    print(f"{gpu}, torch {torch.__version__}, copy {bandwidth / 1e9:.0f} GB/s")
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows += measure_case(case, rounds, bandwidth)
        torch.cuda.empty_cache()
    print(table(rows))
    if options.json:
        import triton

        write_json(options.json, [{**row, "gpu": gpu, "copy": bandwidth, "triton": triton.__version__} for row in rows])


if __name__ == "__main__":
    main()
