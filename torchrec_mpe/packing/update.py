"""New values for rows of packed tables, in place."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_mpe.ops.quantize_and_pack import quantize_and_pack
from torchrec_mpe.ops.reference.bitpack import row_bytes
from torchrec_mpe.ops.update_rows import update_rows_
from torchrec_mpe.packing.bit_widths import MAX_BITS
from torchrec_mpe.packing.layout import END_PADDING
from torchrec_mpe.packing.locate_rows import damaged_directory, locate_rows
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.update_coded import CodedRows, locate_coded_rows, write_coded_rows_

_CHUNK_ROWS = 1 << 14

TableRows = tuple[Tensor, Tensor]
"""Ids, int32 or int64 [n], and the values of their rows, float32 [n, D]."""


@dataclass(frozen=True)
class UpdatedRows:
    """What became of a table's rows in an update; ids that were given twice count once.

    Attributes:
        written (int): rows that have their new values, at the bit-width they have.
        zero_bits (int): rows of 0 bits: they have no bytes, and still read the table's vector for such rows; the mean,
            if they are transformed rows.
    """

    written: int
    zero_bits: int


def update_packed_tables_(
    packed: PackedTables, rows: Mapping[str, TableRows], encoders: Mapping[str, Tensor] | None = None
) -> dict[str, UpdatedRows]:
    """Quantize rows with the tables' bit-widths, step sizes and offsets, and write them over the old ones.

    Rows of coded tables get the codes that packing would give them, in the groups that they are in; as they share
    bytes, two updates of coded tables take turns.

    On the CPU other threads may look up the tables meanwhile, see :func:`.ops.update_rows.update_rows_`: each row is
    found old or new, never half of each, but a lookup of several rows may find some of them old and others new. On
    CUDA the writes are ordered with other work of the current stream, and with no other stream. Memory beside the
    tables: some 40 bytes an id, and a few MiB of rows at a time.

    Tables on the pages of a file (``load`` with ``mmap``) are mapped so that a write copies the page for this process:
    the file and other processes keep the old rows, and each page written to takes memory of its own.

    Args:
        packed (PackedTables): whose ``weights`` change.
        rows (Mapping[str, tuple[Tensor, Tensor]]): by table, ids, int32 or int64 [n], and values, float32 [n, D], on
            any device. Of an id that is given more than once the last values stay.
        encoders (Optional[Mapping[str, Tensor]]): float32 [D, K] of each coded table in ``rows`` that has components,
            ``TableCoding.encoder``; others are ignored.

    Returns:
        dict[str, UpdatedRows]: of each table in ``rows``.

    Raises:
        IndexError: naming the table, if an id is no row of it.
        KeyError: if there is no such table.
        TypeError: naming the table, if ids, values or encoder have another dtype.
        ValueError: naming the table, if a shape is wrong, a coded table has no encoder, values hold NaN or
            infinity, or a damaged directory leads outside the table's rows. Whatever is raised, no row of any table has
            changed.
    """
    index = {table.name: t for t, table in enumerate(packed.tables)}
    for name in rows:
        if name not in index:
            raise KeyError(f"rows are given for table {name}; the tables are {', '.join(index)}")
    if packed.weights.device.type == "meta":
        raise ValueError("the tables are on the meta device: they have no rows to update")
    # All tables before the first row is written.
    located: dict[str, CodedRows | tuple[Tensor, Tensor, Tensor]] = {}
    for name, (ids, values) in rows.items():
        t = index[name]
        positions, distinct = _check_rows(packed, t, ids, values)
        if packed.components_of(t) is not None:
            located[name] = locate_coded_rows(packed, t, distinct, positions, (encoders or {}).get(name))
        else:
            located[name] = positions, *_starts_and_bits(packed, t, distinct)
    updated: dict[str, UpdatedRows] = {}
    for name, found in located.items():
        if isinstance(found, CodedRows):
            written = write_coded_rows_(packed, index[name], found, rows[name][1])
            updated[name] = UpdatedRows(written, found.ids.numel() - written)
            continue
        positions, starts, bits = found
        for width in bits.unique().tolist():
            if width:
                chosen = (bits == width).nonzero().squeeze(1)
                _write(packed, index[name], width, rows[name][1], positions[chosen], starts[chosen])
        zero_bits = int((bits == 0).sum())
        updated[name] = UpdatedRows(bits.numel() - zero_bits, zero_bits)
    return updated


@torch.no_grad()
def _check_rows(packed: PackedTables, t: int, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Check a table's rows; returns of each row once, on the tables' device, its position in ``values`` and its id,
    both int64.
    """
    table = packed.tables[t]
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"table {table.name}: ids must be int32 or int64, got {ids.dtype}")
    if values.dtype != torch.float32:
        raise TypeError(f"table {table.name}: values must be float32, got {values.dtype}")
    if ids.dim() != 1 or tuple(values.shape) != (ids.numel(), table.embedding_dim):
        raise ValueError(
            f"table {table.name}: ids must be [n] and values [n, {table.embedding_dim}], got {list(ids.shape)} and "
            f"{list(values.shape)}"
        )
    outside = ids[(ids < 0) | (ids >= table.num_embeddings)]
    if outside.numel():
        raise IndexError(f"table {table.name}: id {int(outside[0])} is not in [0, {table.num_embeddings})")
    wrong = (~values.isfinite()).any(1).nonzero()
    if wrong.numel():
        raise ValueError(f"table {table.name}: the values of id {int(ids[int(wrong[0])])} hold NaN or infinite values")
    ordered, order = ids.to(packed.weights.device, torch.int64).sort(stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return order[last], ordered[last]


def _starts_and_bits(packed: PackedTables, t: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The byte of the weights where each row of a table that is not coded starts, and its bit-width, both int64."""
    table = packed.tables[t]
    unit = row_bytes(table.embedding_dim, 1)
    first = int(packed.weights_offsets[t])
    is_last = t + 1 == len(packed.tables)
    end = packed.weights.numel() - END_PADDING if is_last else int(packed.weights_offsets[t + 1])
    located = locate_rows(packed, t, ids)
    starts, bits = (located.starts >> 3) + first, located.coding
    kept = bits > 0
    inside = (starts >= first) & (starts + bits * unit <= end) & (bits >= 0) & (bits <= MAX_BITS)
    if not bool((inside | (bits == 0)).all()):
        raise damaged_directory(packed, t)
    return starts.where(kept, first), bits


def _write(packed: PackedTables, t: int, bits: int, values: Tensor, positions: Tensor, starts: Tensor) -> None:
    """Rows of one table and bit-width: values[positions] to the bytes from ``starts`` on."""
    scales = int(packed.scale_index[t])
    alpha = packed.alpha[scales, bits]
    beta = packed.beta[int(packed.beta_offsets[scales]) :][: packed.tables[t].embedding_dim]
    for chosen, start in zip(positions.split(_CHUNK_ROWS), starts.split(_CHUNK_ROWS), strict=True):
        chunk = values.detach()[chosen.to(values.device)].to(packed.weights.device)
        update_rows_(packed.weights, start, quantize_and_pack(chunk, bits, alpha, beta))
