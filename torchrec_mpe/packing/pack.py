"""Float rows to packed tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_mpe.bit_widths import MAX_BITS, TableBitWidths
from torchrec_mpe.packing.bitpack import pack_codes
from torchrec_mpe.packing.layout import CollectionLayout, Run, TableLayout, lay_out, stored_rank_shifts
from torchrec_mpe.packing.packed_tables import PackedTables, TableShape

_CHUNK_ELEMENTS = 1 << 21  # 8 MiB of float32 rows at a time


@dataclass(frozen=True)
class TableToPack:
    """A table's rows, widths and scales.

    Attributes:
        name (str): table.
        widths (TableBitWidths): the bit-width of every row.
        rows (Callable[[int, int], Tensor]): ``rows(start, stop)`` returns the rows of ids start to stop - 1, float32
            [stop - start, D], on any device. Called with increasing ids in pieces of a few MiB; ids that are all
            0 bits wide may be left out.
        alpha (Tensor): float32 [9], the step size of each bit-width; alpha[0] = 0.
        beta (Tensor): float32 [D], offset.
        zero_row (Optional[Tensor]): float32 [D], what 0-bit rows read; None: zeros, at no bytes.
    """

    name: str
    widths: TableBitWidths
    rows: Callable[[int, int], Tensor]
    alpha: Tensor
    beta: Tensor
    zero_row: Tensor | None = None


def quantize_rows(rows: Tensor, bits: int, alpha: Tensor, beta: Tensor) -> Tensor:
    """Unsigned codes of rows, ``clamp(round((x - beta) / alpha), low, high) - low`` with ``low = -2**(bits - 1)``.

    The same float32 operations in the same order as training's fake quantization, so that the codes are bit-identical.

    Args:
        rows (Tensor): float32 [n, D].
        bits (int): 1 to 8.
        alpha (Tensor): float32 scalar tensor, the step size of ``bits``, on the device of ``rows``.
        beta (Tensor): float32 [D].

    Returns:
        Tensor: uint8 [n, D], on the device of ``rows``.
    """
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return ((rows - beta) / alpha).round_().clamp_(low, high).sub_(low).to(torch.uint8)


def pack_tables(tables: Sequence[TableToPack]) -> PackedTables:
    """Quantize and pack tables into one table-batched buffer, a few MiB of rows at a time.

    Tables of one embedding dimension that all come with equal alpha and beta store them once.

    Args:
        tables (Sequence[TableToPack]): tables, in the collection's order.

    Returns:
        PackedTables: on the CPU; :func:`packed_bytes` of the widths gives its size.

    Raises:
        ValueError: naming the table, if names repeat, shapes or dtypes are wrong, a step size in use is not positive
            and finite, or rows hold NaN.

    Example::

        >>> weight = torch.randn(1000, 16)
        >>> packed = pack_tables([TableToPack(
        ...     name="t",
        ...     widths=TableBitWidths(1000, 16, (0, 100, 1000), (4, 1)),
        ...     rows=lambda start, stop: weight[start:stop],
        ...     alpha=torch.tensor([0, 2, 1, 0.5, 0.25, 0.1, 0.05, 0.03, 0.02]),
        ...     beta=torch.zeros(16),
        ... )])
        >>> packed.payload.shape       # 100 rows of 8 bytes, 32 to align, 900 rows of 2 bytes, 64 at the end
        torch.Size([2696])
    """
    widths: dict[str, TableBitWidths] = {}
    for table in tables:
        if table.name in widths:
            raise ValueError(f"table {table.name} is given twice")
        widths[table.name] = table.widths
        _check_scales(table)
    layout = lay_out(widths)
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
    remapped = [table.widths.num_embeddings if table.widths.ranks is not None else 0 for table in tables]
    remap = torch.empty(sum(remapped), dtype=torch.int32)
    remap_offsets: list[int] = []
    following = 0
    for table, table_layout, rows in zip(tables, layout.tables, remapped, strict=True):
        if table.widths.ranks is None:
            remap_offsets.append(-1)
            _pack_ranked(table, table_layout, payload)
        else:
            remap_offsets.append(following)
            table_remap = remap[following : following + rows]
            _stored_ranks(table.widths, table.widths.ranks, out=table_remap)
            _pack_remapped(table, table_layout, table_remap, payload)
            following += rows
    return PackedTables(
        tables=tuple(TableShape(t.name, t.widths.num_embeddings, t.widths.embedding_dim) for t in tables),
        payload=payload,
        **_run_tensors(layout),
        rows_per_table=_int32([table.widths.num_embeddings for table in tables]),
        remap=remap,
        remap_offsets=torch.tensor(remap_offsets, dtype=torch.int64),
        **_scale_tensors(tables),
        **_zero_row_tensors(tables, layout),
    )


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _check_scales(table: TableToPack) -> None:
    dim = table.widths.embedding_dim
    expected = {"alpha": (table.alpha, MAX_BITS + 1), "beta": (table.beta, dim)}
    if table.zero_row is not None:
        expected["zero_row"] = (table.zero_row, dim)
    for what, (tensor, size) in expected.items():
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != (size,):
            raise ValueError(
                f"table {table.name}: {what} must be float32 [{size}], got {tensor.dtype} {list(tensor.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"table {table.name}: {what} must be finite, got {tensor.tolist()}")
    if float(table.alpha[0]) != 0.0:
        raise ValueError(f"table {table.name}: alpha[0] must be 0, got {float(table.alpha[0])}")
    for bits in sorted(set(table.widths.bits)):
        if bits and float(table.alpha[bits]) <= 0.0:
            raise ValueError(f"table {table.name}: the step size of {bits} bits must be positive")


def _read_rows(table: TableToPack, start: int, stop: int) -> Tensor:
    rows = table.rows(start, stop).detach()
    shape = (stop - start, table.widths.embedding_dim)
    if rows.dtype != torch.float32 or tuple(rows.shape) != shape:
        raise ValueError(
            f"table {table.name}: rows({start}, {stop}) must return float32 {list(shape)}, "
            f"got {rows.dtype} {list(rows.shape)}"
        )
    if bool(rows.isnan().any()):
        raise ValueError(f"table {table.name}: rows {start} to {stop - 1} hold NaN")
    return rows


def _packed_rows(table: TableToPack, rows: Tensor, bits: int) -> Tensor:
    codes = quantize_rows(rows, bits, table.alpha.to(rows.device)[bits], table.beta.to(rows.device))
    return pack_codes(codes, bits).cpu()


def _run_rows(payload: Tensor, run: Run) -> Tensor:
    """The rows of a run as uint8 [rows, row_bytes], a view of the payload."""
    return payload[run.base : run.end].view(run.rows, run.row_bytes)


def _pack_ranked(table: TableToPack, layout: TableLayout, payload: Tensor) -> None:
    chunk = max(1, _CHUNK_ELEMENTS // layout.embedding_dim)
    for run in layout.runs:
        if run.bits == 0:
            continue
        target = _run_rows(payload, run)
        for start in range(0, run.rows, chunk):
            stop = min(start + chunk, run.rows)
            rows = _read_rows(table, run.first + start, run.first + stop)
            target[start:stop] = _packed_rows(table, rows, run.bits)


def _pack_remapped(table: TableToPack, layout: TableLayout, remap: Tensor, payload: Tensor) -> None:
    chunk = max(1, _CHUNK_ELEMENTS // layout.embedding_dim)
    for start in range(0, layout.num_embeddings, chunk):
        stop = min(start + chunk, layout.num_embeddings)
        rows = _read_rows(table, start, stop)
        ranks = remap[start:stop].long()
        for run in layout.runs:
            if run.bits == 0:
                continue
            chosen = ((ranks >= run.first) & (ranks < run.first + run.rows)).nonzero().squeeze(1)
            packed = _packed_rows(table, rows[chosen.to(rows.device)], run.bits)
            _run_rows(payload, run)[ranks[chosen] - run.first] = packed


def _stored_ranks(widths: TableBitWidths, ranks: Tensor, out: Tensor) -> None:
    """Write the stored rank of every row: its frequency rank plus the shift of its segment."""
    bounds = _int32(list(widths.bounds[1:]))
    shifts = _int32(stored_rank_shifts(widths))
    for start in range(0, ranks.numel(), _CHUNK_ELEMENTS):
        chunk = ranks[start : start + _CHUNK_ELEMENTS].cpu()
        out[start : start + chunk.numel()] = chunk + shifts[torch.searchsorted(bounds, chunk, right=True)]


def _run_tensors(layout: CollectionLayout) -> dict[str, Tensor]:
    runs = [run for table in layout.tables for run in table.runs]
    offsets = [0]
    for table in layout.tables:
        offsets.append(offsets[-1] + len(table.runs))
    return {
        "run_records": torch.tensor([run.record for run in runs], dtype=torch.int64).view(len(runs), 2),
        "run_starts": _int32([run.first for run in runs]),
        "run_offsets": _int32(offsets),
    }


def _scale_tensors(tables: Sequence[TableToPack]) -> dict[str, Tensor]:
    """One scale set per embedding dimension if its tables agree for every dimension, else one per table."""
    first_of_dim: dict[int, TableToPack] = {}
    for table in tables:
        first_of_dim.setdefault(table.widths.embedding_dim, table)
    firsts = [first_of_dim[table.widths.embedding_dim] for table in tables]
    shared = all(
        torch.equal(table.alpha, first.alpha) and torch.equal(table.beta, first.beta)
        for table, first in zip(tables, firsts, strict=True)
    )
    owners = list(first_of_dim.values()) if shared else list(tables)
    names = [owner.name for owner in owners]
    offsets = [0]
    for owner in owners:
        offsets.append(offsets[-1] + owner.widths.embedding_dim)
    alpha = [owner.alpha.detach().cpu() for owner in owners]
    beta = [owner.beta.detach().cpu() for owner in owners]
    return {
        "alpha": torch.stack(alpha) if alpha else torch.empty(0, MAX_BITS + 1),
        "beta": torch.cat(beta) if beta else torch.empty(0),
        "beta_offsets": _int32(offsets[:-1]),
        "scale_index": _int32(
            [names.index(first.name if shared else table.name) for table, first in zip(tables, firsts, strict=True)]
        ),
    }


def _zero_row_tensors(tables: Sequence[TableToPack], layout: CollectionLayout) -> dict[str, Tensor]:
    offsets: list[int] = []
    vectors: list[Tensor] = []
    following = 0
    for table, table_layout in zip(tables, layout.tables, strict=True):
        if table.zero_row is None or not table_layout.has_zero_bits:
            offsets.append(-1)
            continue
        offsets.append(following)
        vectors.append(table.zero_row.detach().cpu())
        following += table_layout.embedding_dim
    return {
        "zero_rows": torch.cat(vectors) if vectors else torch.empty(0),
        "zero_row_offsets": _int32(offsets),
    }
