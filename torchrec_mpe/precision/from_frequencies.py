"""Precision plans straight from frequencies, without a search: the rivals that a search must beat."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_mpe.packing.bit_widths import MAX_BITS, TableBitWidths
from torchrec_mpe.packing.layout import ALIGNMENT
from torchrec_mpe.packing.size import packed_bytes
from torchrec_mpe.precision.counts_of_table import counts_of_table
from torchrec_mpe.precision.frequency_counter import embedding_bag_configs
from torchrec_mpe.precision.frequency_order import counts_in_order, counts_sha256, frequency_order
from torchrec_mpe.precision.plan import PrecisionPlan, ZeroRow
from torchrec_mpe.precision.row_initialization import RowInitialization

_RULE_MAX_BITS = 6


class _TablesInOrder:
    """Each table's counts in order of frequency, and plans cut from them."""

    def __init__(
        self,
        counts: Mapping[str, Tensor],
        tables: Sequence[EmbeddingBagConfig],
        initialization: RowInitialization | None,
        zero_row: ZeroRow,
    ) -> None:
        if not tables:
            raise ValueError("there are no tables to make a plan for")
        self.tables = tables
        self.initialization = initialization or RowInitialization()
        self.zero_row: ZeroRow = zero_row
        self.order: dict[str, Tensor | None] = {}
        self.counts: dict[str, Tensor] = {}
        for table in tables:
            table_counts = counts_of_table(counts, table).cpu()
            self.order[table.name] = frequency_order(table_counts)
            self.counts[table.name] = counts_in_order(table_counts, self.order[table.name])
        self.digest = counts_sha256({t.name: counts[t.name] for t in tables})

    def widths(self, segments: Callable[[str], tuple[list[int], list[int]]]) -> dict[str, TableBitWidths]:
        """Bit-widths from a function of the table's name that gives bounds and bits."""
        widths: dict[str, TableBitWidths] = {}
        for table in self.tables:
            bounds, bits = segments(table.name)
            widths[table.name] = TableBitWidths(
                table.num_embeddings, table.embedding_dim, tuple(bounds), tuple(bits), self.order[table.name]
            )
        return widths

    def packed_bytes(self, widths: Mapping[str, TableBitWidths]) -> int:
        """The exact bytes of tables packed at these widths."""
        return packed_bytes(widths, learned_zero_rows=self.zero_row == "learned").total

    def plan(
        self, widths: Mapping[str, TableBitWidths], candidate_bits: tuple[int, ...], method: str, **settings: Any
    ) -> PrecisionPlan:
        provenance = {"method": method, **settings, "counts_sha256": self.digest}
        return PrecisionPlan(widths, candidate_bits, self.zero_row, self.initialization, provenance)


def _tables(model: nn.Module | Sequence[EmbeddingBagConfig]) -> Sequence[EmbeddingBagConfig]:
    return embedding_bag_configs(model) if isinstance(model, nn.Module) else model


def uniform_precision(
    model: nn.Module | Sequence[EmbeddingBagConfig], bits: int, *, initialization: RowInitialization | None = None
) -> PrecisionPlan:
    """Every row of every table at the same bit-width, 1 to 8.

    Args:
        model (Union[nn.Module, Sequence[EmbeddingBagConfig]]): a model with EmbeddingBagCollections, or its tables.
        bits (int): the bit-width.
        initialization (Optional[RowInitialization]): of the rows.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"the bit-width must lie between 1 and {MAX_BITS}, got {bits}")
    tables = _tables(model)
    widths = {t.name: TableBitWidths(t.num_embeddings, t.embedding_dim, (0, t.num_embeddings), (bits,)) for t in tables}
    provenance = {"method": "uniform", "bits": bits}
    return PrecisionPlan(widths, (bits,), "zero", initialization or RowInitialization(), provenance)


def cut_precision(
    counts: Mapping[str, Tensor],
    model: nn.Module | Sequence[EmbeddingBagConfig],
    bits: int,
    fraction: float,
    *,
    initialization: RowInitialization | None = None,
    zero_row: ZeroRow = "learned",
) -> PrecisionPlan:
    """The most frequent ``fraction`` of all tables' rows at one bit-width, the others at none.

    Args:
        counts (Mapping[str, Tensor]): per table, int64 [num_embeddings] lookups in the training data.
        model (Union[nn.Module, Sequence[EmbeddingBagConfig]]): a model with EmbeddingBagCollections, or its tables.
        bits (int): the bit-width of the kept rows, 1 to 8.
        fraction (float): in (0, 1]; at least one row is kept.
        initialization (Optional[RowInitialization]): of the rows.
        zero_row (str): "learned" or "zero".
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"the bit-width must lie between 1 and {MAX_BITS}, got {bits}")
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of rows to keep must lie in (0, 1], got {fraction}")
    tables = _tables(model)
    ordered = _TablesInOrder(counts, tables, initialization, zero_row)
    every_count = torch.cat([ordered.counts[t.name] for t in tables])
    keep = max(1, round(fraction * len(every_count)))
    kept = torch.zeros(len(every_count), dtype=torch.bool)
    kept[torch.argsort(every_count, descending=True, stable=True)[:keep]] = True
    rows = dict(
        zip(ordered.counts, (int(k.sum()) for k in kept.split([len(c) for c in ordered.counts.values()])), strict=True)
    )
    widths = ordered.widths(lambda name: _head_and_tail(rows[name], len(ordered.counts[name]), bits))
    return ordered.plan(widths, (0, bits), "cut", bits=bits, fraction=fraction)


def _head_and_tail(head: int, rows: int, bits: int) -> tuple[list[int], list[int]]:
    if head in (0, rows):
        return [0, rows], [bits if head else 0]
    return [0, head, rows], [bits, 0]


def precision_from_frequencies(
    counts: Mapping[str, Tensor],
    model: nn.Module | Sequence[EmbeddingBagConfig],
    *,
    ratio: float | None = None,
    bytes: int | None = None,
    initialization: RowInitialization | None = None,
    zero_row: ZeroRow = "learned",
) -> PrecisionPlan:
    """One more bit per fourfold count: ``b = clip(round(log2(count / c0) / 2), 0, 6)``, no bits for unseen rows.

    The cutoff c0 is bisected until the packed tables' real bytes (payload, directories, scales, padding) meet the
    target. Where many rows share the count at which the target is crossed, only some of them, in the fixed order of
    their places, get the wider width, so that the target is met closely.

    Args:
        counts (Mapping[str, Tensor]): per table, int64 [num_embeddings] lookups in the training data.
        model (Union[nn.Module, Sequence[EmbeddingBagConfig]]): a model with EmbeddingBagCollections, or its tables.
        ratio (Optional[float]): target compression against FP32 rows, for example 100; give this or ``bytes``.
        bytes (Optional[int]): target bytes of all packed tables.
        initialization (Optional[RowInitialization]): of the rows.
        zero_row (str): "learned" or "zero".

    Returns:
        PrecisionPlan: within 1% of the target, or within 64 bytes a table, to which tables are aligned.

    Raises:
        ValueError: if no cutoff comes so close to the target; the message says what can be reached.

    Example::

        plan = precision_from_frequencies(counts, model, ratio=100)
        prepare_retrain_(model, plan)
    """
    if (ratio is None) == (bytes is None):
        raise ValueError("give either ratio or bytes")
    if not (ratio if ratio is not None else bytes or 0) > 0:
        raise ValueError(f"the target must be positive, got {ratio if ratio is not None else bytes}")
    tables = _tables(model)
    ordered = _TablesInOrder(counts, tables, initialization, zero_row)
    fp32_bytes = sum(4 * t.num_embeddings * t.embedding_dim for t in tables)
    target = bytes if bytes is not None else fp32_bytes / (ratio or 1)

    def size(offset: float) -> int:
        return ordered.packed_bytes(ordered.widths(lambda name: _rule_segments(ordered.counts[name], offset)))

    least, most = low, high = _offset_range(ordered.counts.values())
    for _ in range(60):
        middle = (low + high) / 2
        if size(middle) > target:
            high = middle
        else:
            low = middle
    # All the rows of one count change width at one offset: between low and high the bytes can jump over the target.
    widths = ordered.widths(lambda name: _rule_segments(ordered.counts[name], low))
    wider = ordered.widths(lambda name: _rule_segments(ordered.counts[name], high))
    widths = _between(ordered, widths, wider, target)
    reached = ordered.packed_bytes(widths)
    if abs(reached - target) > max(0.01 * target, ALIGNMENT * len(tables)):
        smallest, largest = size(least), size(most)
        raise ValueError(
            f"no plan comes within 1% of {target:,.0f} bytes ({fp32_bytes / target:.1f}x): the closest has {reached:,} "
            f"({fp32_bytes / reached:.1f}x), and the rule reaches from {smallest:,} to {largest:,} bytes "
            f"({fp32_bytes / largest:.1f}x to {fp32_bytes / smallest:.1f}x)"
        )
    bits = tuple(range(_RULE_MAX_BITS + 1))
    return ordered.plan(widths, bits, "frequency rule", ratio=ratio, bytes=bytes, reached_bytes=reached)


def _offset_range(counts: Any) -> tuple[float, float]:
    """Offsets at which every row has no bits, and every seen row all bits."""
    most = max(int(c.max()) for c in counts)
    return -math.log2(max(most, 1)) / 2 - 1, float(_RULE_MAX_BITS + 1)


def _rule_segments(counts: Tensor, offset: float) -> tuple[list[int], list[int]]:
    """Bounds and bits for never increasing counts: ``round(log2(count) / 2 + offset)``, offset being -log2(c0) / 2."""
    # Width w or more from the count at which log2(count) / 2 + offset reaches w - 1/2.
    thresholds = [2.0 ** (2 * (w - 0.5 - offset)) for w in range(_RULE_MAX_BITS, 0, -1)]
    ascending = -counts.double()
    ends = torch.searchsorted(ascending, -torch.tensor(thresholds, dtype=torch.float64), right=True).tolist()
    seen = int((counts > 0).sum())
    bounds, bits = [0], []
    for width, end in zip(range(_RULE_MAX_BITS, -1, -1), [*(min(e, seen) for e in ends), len(counts)], strict=True):
        if end > bounds[-1]:
            bounds.append(end)
            bits.append(width)
    return bounds, bits


def _between(
    ordered: _TablesInOrder, narrow: Mapping[str, TableBitWidths], wide: Mapping[str, TableBitWidths], target: float
) -> dict[str, TableBitWidths]:
    """Widen the first rows of each changing segment, the same share everywhere, as far as the target allows."""

    def mixed(share: float) -> dict[str, TableBitWidths]:
        return ordered.widths(lambda name: _mix(narrow[name], wide[name], share))

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if ordered.packed_bytes(mixed(middle)) > target:
            high = middle
        else:
            low = middle
    return mixed(low)


def _mix(narrow: TableBitWidths, wide: TableBitWidths, share: float) -> tuple[list[int], list[int]]:
    """Segments of ``narrow``, of whose rows the first ``share`` that ``wide`` widens are widened."""
    cuts = sorted({*narrow.bounds, *wide.bounds})
    bounds: list[int] = [0]
    bits: list[int] = []

    def extend(end: int, width: int) -> None:
        if end <= bounds[-1]:
            return
        if bits and bits[-1] == width:
            bounds[-1] = end
        else:
            bounds.append(end)
            bits.append(width)

    for first, last in pairwise(cuts):
        lower, upper = _width_at(narrow, first), _width_at(wide, first)
        extend(first + round(share * (last - first)) if lower != upper else first, upper)
        extend(last, lower)
    return bounds, bits


def _width_at(widths: TableBitWidths, place: int) -> int:
    return next(b for end, b in zip(widths.bounds[1:], widths.bits, strict=True) if place < end)
