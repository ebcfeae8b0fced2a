"""Precision plans for rows that are trained already: widths and scales by the error of quantization."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_mpe.files.progress import progress_bar
from torchrec_mpe.packing.bit_widths import MAX_BITS, TableBitWidths
from torchrec_mpe.precision.allocate_bytes import allocate_under_budget, allocate_under_error, curves_of
from torchrec_mpe.precision.counts_of_table import counts_of_table
from torchrec_mpe.precision.frequency_order import counts_sha256, frequency_order
from torchrec_mpe.precision.groups import log_rank_bounds
from torchrec_mpe.precision.plan import PrecisionPlan, ZeroRow
from torchrec_mpe.precision.row_errors import RowErrors, quantized_rows
from torchrec_mpe.precision.row_histograms import RowHistograms, RowSource, read_histograms, read_pieces
from torchrec_mpe.precision.table_widths import Allocation, TableCandidates, TableScales

_LOG_RANK_SEGMENTS = 24
_EVEN_SEGMENTS = 16  # the last log-rank segments hold half of the rows: too much to change width at once
_ATTEMPTS = 6
_UNSEEN = 1e-3  # lookups of a row without any: it gets bits last, but before they are left over


@dataclass(frozen=True)
class PostTrainingPrecision:
    """Widths and scales of all tables.

    Attributes:
        plan (PrecisionPlan): bit-widths.
        scales (Mapping[str, TableScales]): by table; every table has its own.
    """

    plan: PrecisionPlan
    scales: Mapping[str, TableScales]


def precision_from_errors(
    rows: Mapping[str, RowSource],
    tables: Sequence[EmbeddingBagConfig],
    counts: Mapping[str, Tensor] | None = None,
    *,
    ratio: float | None = None,
    bytes: int | None = None,
    max_error: float | None = None,
    zero_row: ZeroRow = "learned",
    progress: bool = False,
) -> PostTrainingPrecision:
    """Bit-widths and scales for trained rows, by the squared error that they cause, weighted by lookups.

    A table is cut into segments of the frequency order, evenly in the logarithm of the place, none over a sixteenth
    of it. The weighted squared error of each segment at each width and many step sizes comes from histograms of the
    rows, which are read twice. Widths, step sizes, offset and 0-bit row of a table are fitted to each other, and bytes
    are given where they save most: real bytes, with directories, scales and padding.

    The quantizer is that of training, ``clamp(round((x - beta) / alpha_b), -2**(b-1), 2**(b-1) - 1) * alpha_b + beta``
    (LSQ+, arXiv 2004.09576), with alpha and beta of each table.

    Args:
        rows (Mapping[str, Callable[[int, int], Tensor]]): by table, ``rows(start, stop)`` returns float32
            [stop - start, D]; read in pieces of a few MiB, several times.
        tables (Sequence[EmbeddingBagConfig]): names and shapes.
        counts (Optional[Mapping[str, Tensor]]): per table, int64 [num_embeddings] lookups; None: all rows alike, and
            segments of ids instead of the frequency order.
        ratio (Optional[float]): compression against FP32 rows, for example 30; give this, ``bytes`` or ``max_error``.
        bytes (Optional[int]): bytes of all packed tables.
        max_error (Optional[float]): largest relative error of each table, the root of ``sum(lookups * |row - packed|^2)
            / sum(lookups * |row|^2)``, measured on all rows; of a table without lookups all rows count alike.
        zero_row (str): "learned": 0-bit rows read their weighted mean; "zero": zeros.
        progress (bool): show a progress bar.

    Returns:
        PostTrainingPrecision: at most ``bytes``, and not more than 1% below them unless more bytes do not lower the
        error, as when all rows have 8 bits, or a table of one width would first have to pay for a directory; or the
        fewest bytes found for ``max_error``.

    Raises:
        KeyError: naming the table, if it has no rows or counts.
        ValueError: naming the table, if counts are of another size, rows are not finite or the error cannot be
            reached, not even with 8 bits; or if all tables without any bits take more bytes.

    Example::

        found = precision_from_errors({"t": lambda start, stop: weight[start:stop]}, [config], counts, ratio=30)
        found.plan.summary(), found.scales["t"].alpha
    """
    if [ratio, bytes, max_error].count(None) != 2:
        raise ValueError("give one of ratio, bytes and max_error")
    given = next(value for value in (ratio, bytes, max_error) if value is not None)
    if not 0 < given < math.inf:
        raise ValueError(f"the target must be a positive number, got {given}")
    if not tables:
        raise ValueError("there are no tables to make a plan for")
    if zero_row not in ("learned", "zero"):
        raise ValueError(f"zero_row must be 'learned' or 'zero', got {zero_row!r}")
    lookups = {table.name: _lookups(table, rows, counts) for table in tables}
    candidates: list[TableCandidates] = []
    total = 2 * sum(t.num_embeddings for t in tables)
    with progress_bar(total=total, desc="measuring rows", unit="row", unit_scale=True, disable=not progress) as bar:
        for table in tables:
            order = frequency_order(lookups[table.name])
            histograms = _histograms(table, rows[table.name], order, lookups[table.name], bar.update)
            candidates.append(TableCandidates(table.name, histograms, order, zero_row == "learned"))
    if max_error is not None:
        chosen = {t.name: _under_error(t, rows[t.name], lookups[t.name], max_error) for t in candidates}
    else:
        fp32_bytes = sum(4 * t.num_embeddings * t.embedding_dim for t in tables)
        budget = int(bytes if bytes is not None else fp32_bytes / (ratio or 1))
        allocations = allocate_under_budget(candidates, budget, zero_row == "learned")
        chosen = {t.name: (allocations[t.name], t.scales(allocations[t.name])) for t in candidates}
    provenance = {
        "method": "quantization error",
        "ratio": ratio,
        "bytes": bytes,
        "max_error": max_error,
        **({} if counts is None else {"counts_sha256": counts_sha256({t.name: counts[t.name] for t in tables})}),
    }
    widths = {t.name: _joined(t, chosen[t.name][0]) for t in candidates}
    plan = PrecisionPlan(widths, tuple(range(MAX_BITS + 1)), zero_row, provenance=provenance)
    scales = {name: scales for name, (_, scales) in chosen.items()}
    return PostTrainingPrecision(plan, scales)


def _lookups(table: EmbeddingBagConfig, rows: Mapping[str, RowSource], counts: Mapping[str, Tensor] | None) -> Tensor:
    if table.name not in rows:
        raise KeyError(f"no rows for table {table.name}; tables with rows: {', '.join(sorted(rows)) or 'none'}")
    if counts is None:
        return torch.ones(table.num_embeddings, dtype=torch.int64)
    return counts_of_table(counts, table).cpu()


def _histograms(
    table: EmbeddingBagConfig, rows: RowSource, order: Tensor | None, lookups: Tensor, done: Callable[[int], object]
) -> RowHistograms:
    count = table.num_embeddings
    even = (round(count * k / _EVEN_SEGMENTS) for k in range(_EVEN_SEGMENTS))
    bounds = sorted({*log_rank_bounds(count, _LOG_RANK_SEGMENTS), *even})
    weights = lookups.double()
    weights[weights == 0] = _UNSEEN
    return read_histograms(table.name, rows, table.embedding_dim, bounds, order, weights, done)


def _under_error(
    table: TableCandidates, rows: RowSource, lookups: Tensor, max_error: float
) -> tuple[Allocation, TableScales]:
    """The fewest bytes whose error, measured on all rows, is at most ``max_error``."""
    aim, curves = max_error, curves_of(table)
    square = float((table.squares + 2 * table.sums @ table.center + table.weights * table.center.square().sum()).sum())
    for _ in range(_ATTEMPTS):
        allocation = allocate_under_error(table, curves, aim * aim * square)
        if allocation is None:
            break
        scales = table.scales(allocation)
        found = _measured(table, rows, lookups, allocation, scales)
        if found <= max_error:
            return allocation, scales
        aim *= 0.998 * max_error / found
    widest = min(table.allocations([0.0])[0], key=lambda a: (a.error, a.total_bytes))
    scales = table.scales(widest)
    reached = _measured(table, rows, lookups, widest, scales)
    if reached <= max_error:
        return widest, scales
    raise ValueError(
        f"table {table.name}: a relative error of {max_error:g} cannot be met: rows of 8 bits reach {reached:.4g}"
    )


def _measured(
    table: TableCandidates, rows: RowSource, lookups: Tensor, allocation: Allocation, scales: TableScales
) -> float:
    widths, errors = table.widths(allocation.bounds, allocation.bits), RowErrors()
    for start, chunk in read_pieces(table.name, rows, table.embedding_dim, widths.num_embeddings):
        stop = start + len(chunk)
        quantized = quantized_rows(chunk, widths.of_rows(start, stop), scales.alpha, scales.beta, scales.zero_row)
        errors.add(chunk, quantized, lookups[start:stop])
    return errors.decisive_relative_rms


def _joined(table: TableCandidates, allocation: Allocation) -> TableBitWidths:
    """Checked widths, neighbouring segments of equal width joined."""
    runs = table.widths(allocation.bounds, allocation.bits).runs()
    bounds = (*(first for first, _ in runs), allocation.bounds[-1])
    return TableBitWidths(bounds[-1], table.embedding_dim, bounds, tuple(bits for _, bits in runs), table.order)
