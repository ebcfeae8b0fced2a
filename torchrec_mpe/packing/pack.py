"""Float rows to packed tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.quantize_and_pack import quantize_and_pack
from torchrec_mpe.ops.reference.bitpack import row_bytes
from torchrec_mpe.packing.bit_widths import MAX_BITS, TableBitWidths
from torchrec_mpe.packing.choose_directory import lay_out
from torchrec_mpe.packing.directory_lines import row_bits, write_directory
from torchrec_mpe.packing.layout import CollectionLayout, Run, TableLayout
from torchrec_mpe.packing.pack_coded import CodedTableToPack, coding_tensors, pack_coded_rows_, write_coded_directory
from torchrec_mpe.packing.packed_tables import PackedTables, TableShape, int32_tensor
from torchrec_mpe.packing.table_coding import TableCoding

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
        directory (str): "ranked", "remap", "nibble", "bitmap", or "auto" for the smallest: see
            :class:`torchrec_mpe.ops.directory.Directory`.
    """

    name: str
    widths: TableBitWidths
    rows: Callable[[int, int], Tensor]
    alpha: Tensor
    beta: Tensor
    zero_row: Tensor | None = None
    directory: str = "auto"


def pack_tables(tables: Sequence[TableToPack | CodedTableToPack]) -> PackedTables:
    """Quantize and pack tables into one table-batched buffer, a few MiB of rows at a time.

    Tables of one embedding dimension that all come with equal alpha and beta store them once.

    Args:
        tables (Sequence[TableToPack | CodedTableToPack]): tables, in the collection's order.

    Returns:
        PackedTables: on the CPU; :func:`packed_bytes` of the widths and codings gives its size.

    Raises:
        ValueError: naming the table, if names repeat, shapes or dtypes are wrong, a step size in use is not positive
            and finite, rows hold NaN, or the directory asked for cannot store these widths.

    Example::

        >>> weight = torch.randn(1000, 16)
        >>> packed = pack_tables([TableToPack(
        ...     name="t",
        ...     widths=TableBitWidths(1000, 16, (0, 100, 1000), (4, 1)),
        ...     rows=lambda start, stop: weight[start:stop],
        ...     alpha=torch.tensor([0, 2, 1, 0.5, 0.25, 0.1, 0.05, 0.03, 0.02]),
        ...     beta=torch.zeros(16),
        ... )])
        >>> packed.weights.shape    # 100 rows of 8 bytes, 32 to align, 900 rows of 2 bytes, 56 to align, 64 at the end
        torch.Size([2752])
    """
    widths: dict[str, TableBitWidths | TableCoding] = {}
    for table in tables:
        if table.name in widths:
            raise ValueError(f"table {table.name} is given twice")
        if isinstance(table, CodedTableToPack):
            widths[table.name] = table.coding
        else:
            widths[table.name] = table.widths
            _check_scales(table)
    layout = lay_out(widths, {table.name: table.directory for table in tables})
    weights = torch.zeros(layout.weights_bytes, dtype=torch.uint8)
    directory = torch.zeros(layout.directory_bytes, dtype=torch.uint8)
    starts = zip(layout.weights_offsets, layout.directory_offsets, strict=True)
    for table, table_layout, (start, directory_start) in zip(tables, layout.tables, starts, strict=True):
        table_directory = directory[max(directory_start, 0) :][: table_layout.directory_bytes]
        table_weights = weights[start : start + table_layout.end]
        if isinstance(table, CodedTableToPack):
            ranks = write_coded_directory(table.coding, table_layout, table_directory)
            pack_coded_rows_(table, table_layout, ranks, table_weights)
            continue
        write_directory(table.widths, table_layout, table_directory)
        match table_layout.directory:
            case Directory.RANKED:
                _pack_runs(table, table_layout, table_weights)
            case Directory.REMAP:
                _pack_remapped(table, table_layout, table_directory.view(torch.int32), table_weights)
            case _:
                _pack_in_id_order(table, table_weights)
    return PackedTables(
        tables=tuple(TableShape(t.name, t.num_embeddings, t.embedding_dim) for t in layout.tables),
        weights=weights,
        weights_offsets=torch.tensor(layout.weights_offsets, dtype=torch.int64),
        rows_per_table=int32_tensor([table.num_embeddings for table in layout.tables]),
        **_run_tensors(layout),
        directory_kinds=int32_tensor([table.directory for table in layout.tables]),
        directory=directory,
        directory_offsets=torch.tensor(layout.directory_offsets, dtype=torch.int64),
        **_scale_tensors(tables),
        **_zero_row_tensors(tables, layout),
        **coding_tensors([t.coding if isinstance(t, CodedTableToPack) else None for t in tables]),
    )


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
    return quantize_and_pack(rows, bits, table.alpha.to(rows.device)[bits], table.beta.to(rows.device)).cpu()


def _run_rows(weights: Tensor, run: Run) -> Tensor:
    """The rows of a run as uint8 [rows, row_bytes], a view of the table's weights."""
    return weights[run.first_byte : run.end].view(run.rows, run.row_bits // 8)


def _chunk_rows(embedding_dim: int) -> int:
    return max(1, _CHUNK_ELEMENTS // max(embedding_dim, 8))  # a row has at least a block


def _pack_runs(table: TableToPack, layout: TableLayout, weights: Tensor) -> None:
    chunk = _chunk_rows(layout.embedding_dim)
    for run in layout.runs:
        if run.bits == 0:
            continue
        target = _run_rows(weights, run)
        for start in range(0, run.rows, chunk):
            stop = min(start + chunk, run.rows)
            rows = _read_rows(table, run.first + start, run.first + stop)
            target[start:stop] = _packed_rows(table, rows, run.bits)


def _pack_remapped(table: TableToPack, layout: TableLayout, remap: Tensor, weights: Tensor) -> None:
    chunk = _chunk_rows(layout.embedding_dim)
    for start in range(0, layout.num_embeddings, chunk):
        stop = min(start + chunk, layout.num_embeddings)
        rows = _read_rows(table, start, stop)
        ranks = remap[start:stop].long()
        for run in layout.runs:
            if run.bits == 0:
                continue
            chosen = ((ranks >= run.first) & (ranks < run.first + run.rows)).nonzero().squeeze(1)
            packed = _packed_rows(table, rows[chosen.to(rows.device)], run.bits)
            _run_rows(weights, run)[ranks[chosen] - run.first] = packed


def _pack_in_id_order(table: TableToPack, weights: Tensor) -> None:
    """Rows of more than 0 bits one after another, without gaps."""
    rows, dim = table.widths.num_embeddings, table.widths.embedding_dim
    unit = row_bytes(dim, 1)  # a row of b bits is b units
    units = weights.view(-1, unit)
    following = 0
    chunk = _chunk_rows(dim)
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        bits = row_bits(table.widths, start, stop).long()
        ends = bits.cumsum(0)
        size = int(ends[-1])
        if size == 0:
            continue
        values = _read_rows(table, start, stop)
        target = units[following : following + size]
        for width in bits.unique().tolist():
            if width:
                chosen = (bits == width).nonzero().squeeze(1)
                packed = _packed_rows(table, values[chosen.to(values.device)], width)
                places = (ends[chosen] - width).unsqueeze(1) + torch.arange(width)
                target[places] = packed.view(-1, width, unit)
        following += size


def _run_tensors(layout: CollectionLayout) -> dict[str, Tensor]:
    runs = [run for table in layout.tables for run in table.runs]
    offsets = [0]
    for table in layout.tables:
        offsets.append(offsets[-1] + len(table.runs))
    return {
        "run_records": torch.tensor([run.record for run in runs], dtype=torch.int64).view(len(runs), 2),
        "run_starts": int32_tensor([run.first for run in runs]),
        "run_offsets": int32_tensor(offsets),
    }


def _scale_tensors(all_tables: Sequence[TableToPack | CodedTableToPack]) -> dict[str, Tensor]:
    """One scale set per embedding dimension if its tables agree for every dimension, else one per table."""
    first_of_dim: dict[int, TableToPack] = {}
    tables = [table for table in all_tables if isinstance(table, TableToPack)]
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
    index = {
        table.name: names.index(first.name if shared else table.name)
        for table, first in zip(tables, firsts, strict=True)
    }
    return {
        "alpha": torch.stack(alpha) if alpha else torch.empty(0, MAX_BITS + 1),
        "beta": torch.cat(beta) if beta else torch.empty(0),
        "beta_offsets": int32_tensor(offsets[:-1]),
        "scale_index": int32_tensor([index.get(table.name, -1) for table in all_tables]),
    }


def _zero_row_tensors(tables: Sequence[TableToPack | CodedTableToPack], layout: CollectionLayout) -> dict[str, Tensor]:
    offsets: list[int] = []
    vectors: list[Tensor] = []
    following = 0
    for table, table_layout in zip(tables, layout.tables, strict=True):
        zero_row = table.coding.zero_row if isinstance(table, CodedTableToPack) else table.zero_row
        if zero_row is None or not table_layout.has_zero_bits:
            offsets.append(-1)
            continue
        offsets.append(following)
        vectors.append(zero_row.detach().cpu())
        following += table_layout.embedding_dim
    return {
        "zero_rows": torch.cat(vectors) if vectors else torch.empty(0),
        "zero_row_offsets": int32_tensor(offsets),
    }
