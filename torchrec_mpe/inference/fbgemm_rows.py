"""Packed tables as rows of FBGEMM's inference TBE."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
    nbit_construct_split_state,
    rounded_row_size_in_bytes,
)
from torch import Tensor

from torchrec_mpe.ops.packed_embedding_bag import packed_embedding_bag
from torchrec_mpe.ops.reference.bitpack import row_bytes, unpack_codes
from torchrec_mpe.packing.packed_tables import PackedTables

SPARSE_TYPES = (SparseType.INT2, SparseType.INT4, SparseType.INT8)
"""FBGEMM's row formats, by the number that ``row_map`` gives them."""

ZERO_BITS = 3
"""What ``row_map`` says of a row of 0 bits; no row format."""

_FORMAT_OF_WIDTH = (ZERO_BITS, 0, 0, 1, 1, 2, 2, 2, 2)
_FORMAT_BITS = (2, 4, 8)
_MAX_ROWS = 2**29  # position * 4 + format is an int32
_CHUNK_ELEMENTS = 1 << 21  # 2 MiB of codes at a time
_CHUNK_ROWS = 1 << 15  # 30 MiB of lines of a bitmap


@dataclass(frozen=True)
class SubTable:
    """The rows of one table that share a format: a table of FBGEMM's TBE.

    Attributes:
        table (int): index among the packed tables.
        format (int): index in SPARSE_TYPES.
        rows (int): number of rows, at least 1.
        columns (int): embedding dimension, padded to the multiple of 4 that FBGEMM demands.
    """

    table: int
    format: int
    rows: int
    columns: int

    def row_bytes(self, row_alignment: int) -> int:
        """Bytes of a row, padding included."""
        size: int = rounded_row_size_in_bytes(self.columns, SPARSE_TYPES[self.format], row_alignment)
        return size


@dataclass(frozen=True)
class FbgemmRows:
    """T packed tables in FBGEMM's formats: INT2 for 1 and 2 bits, INT4 for 3 and 4, INT8 for 5 to 8.

    A row is ``code * scale + bias``, scale and bias float16 in front of the codes. With ``s = float16(alpha[b])`` and
    ``bias = -2**(b - 1) * s``, exact in float16, it is ``(code - 2**(b - 1)) * s``: the packed row without beta, off by
    at most ``|code - 2**(b - 1)| * |s - alpha[b]|``. Rows of 0 bits are not stored.

    The rows of a coded table are decoded and quantized by FBGEMM's own quantizer, each with the scale and bias of its
    range, all to one format: whatever their bits were, a row takes D + 4 bytes as INT8 and D / 2 + 4 as INT4.

    Attributes:
        weights (Tensor): uint8 [P], the sub-tables one after another as FBGEMM lays them out.
        sub_tables (tuple[SubTable, ...]): at most one of a table and format, by table and format. A table of 0-bit
            rows alone has one that no id reaches, of one INT2 row: FBGEMM knows no table without rows.
        row_map (Tensor): int32 [M], ``position * 4 + format`` of each row of each mapped table, ZERO_BITS for 0 bits.
        row_map_offsets (tuple[int, ...]): T, where each table's part of ``row_map`` starts; -1 for a table whose ids
            are the positions, because all rows have one format.
        formats (tuple[int, ...]): the formats of the rows that ids reach, at least one.
    """

    weights: Tensor
    sub_tables: tuple[SubTable, ...]
    row_map: Tensor
    row_map_offsets: tuple[int, ...]
    formats: tuple[int, ...]


def sub_table_offsets(sub_tables: Sequence[SubTable], row_alignment: int) -> tuple[list[int], int]:
    """The byte where each sub-table starts, and the bytes of all, in FBGEMM's layout."""
    specs = [("", s.rows, s.columns, SPARSE_TYPES[s.format], EmbeddingLocation.HOST) for s in sub_tables]
    split = nbit_construct_split_state(specs, cacheable=False, row_alignment=row_alignment)
    return split.offsets, split.host_size


def sub_table_rows(weights: Tensor, sub_tables: Sequence[SubTable], row_alignment: int) -> list[Tensor]:
    """Each sub-table as uint8 [rows, row_bytes], views of ``weights``."""
    offsets, _ = sub_table_offsets(sub_tables, row_alignment)
    views: list[Tensor] = []
    for sub_table, offset in zip(sub_tables, offsets, strict=True):
        size = sub_table.row_bytes(row_alignment)
        views.append(weights[offset : offset + sub_table.rows * size].view(sub_table.rows, size))
    return views


def realigned(weights: Tensor, sub_tables: Sequence[SubTable], row_alignment: int, new_alignment: int) -> Tensor:
    """The same rows with another row alignment."""
    _, size = sub_table_offsets(sub_tables, new_alignment)
    result = torch.zeros(size, dtype=torch.uint8, device=weights.device)
    sources = sub_table_rows(weights, sub_tables, row_alignment)
    targets = sub_table_rows(result, sub_tables, new_alignment)
    for source, target in zip(sources, targets, strict=True):
        used = min(source.shape[1], target.shape[1])
        target[:, :used] = source[:, :used]
    return result


def fbgemm_rows(packed: PackedTables, row_alignment: int, coded_rows: SparseType = SparseType.INT8) -> FbgemmRows:
    """Convert packed tables to FBGEMM's formats, a few MiB of codes at a time.

    Args:
        packed (PackedTables): on the CPU.
        row_alignment (int): bytes to whose multiple rows are padded: 1 or more on CPU, a multiple of 16 on CUDA.
        coded_rows (SparseType): the format of the rows of coded tables, INT8, INT4 or INT2.

    Returns:
        FbgemmRows: on the CPU.

    Raises:
        ValueError: naming the table, if it has more than 2**29 rows, or a step size in use, or the scale or bias of a
            decoded row, is no float16; or if there is no such format.
    """
    if coded_rows not in SPARSE_TYPES:
        raise ValueError(f"rows of coded tables can be INT2, INT4 or INT8, not {coded_rows}")
    coded_format = SPARSE_TYPES.index(coded_rows)
    formats = [_formats(packed, t, coded_format) for t in range(len(packed.tables))]
    sub_tables: list[SubTable] = []
    used: set[int] = set()
    for t, (table, of_rows) in enumerate(zip(packed.tables, formats, strict=True)):
        if table.num_embeddings > _MAX_ROWS:
            raise ValueError(f"table {table.name}: {table.num_embeddings} rows are more than FBGEMM's map can count")
        rows = torch.bincount(of_rows, minlength=ZERO_BITS).tolist()[:ZERO_BITS]
        used.update(f for f, n in enumerate(rows) if n)
        if not any(rows):
            rows[0] = 1
        columns = -(-table.embedding_dim // 4) * 4
        sub_tables += [SubTable(t, f, n, columns) for f, n in enumerate(rows) if n]
    _, size = sub_table_offsets(sub_tables, row_alignment)
    weights = torch.zeros(size, dtype=torch.uint8)
    views = sub_table_rows(weights, sub_tables, row_alignment)
    maps: list[Tensor] = []
    offsets: list[int] = []
    for t, of_rows in enumerate(formats):
        targets = {s.format: view for s, view in zip(sub_tables, views, strict=True) if s.table == t}
        positions = _positions(of_rows)
        if packed.components_of(t) is None:
            _fill(packed, t, positions, targets)
        else:
            _fill_decoded(packed, t, of_rows, positions, targets)
        if bool((of_rows == of_rows[0]).all()) and int(of_rows[0]) != ZERO_BITS:
            offsets.append(-1)
        else:
            offsets.append(sum(part.numel() for part in maps))
            maps.append(positions.mul_(4).add_(of_rows))
    row_map = torch.cat(maps) if maps else torch.empty(0, dtype=torch.int32)
    return FbgemmRows(weights, tuple(sub_tables), row_map, tuple(offsets), tuple(sorted(used)) or (0,))


def _chunks(packed: PackedTables, t: int) -> Iterator[Tensor]:
    """The ids of a table in pieces."""
    table = packed.tables[t]
    step = min(_CHUNK_ROWS, max(1, _CHUNK_ELEMENTS // table.embedding_dim))
    for start in range(0, table.num_embeddings, step):
        yield torch.arange(start, min(start + step, table.num_embeddings))


def _formats(packed: PackedTables, t: int, coded_format: int) -> Tensor:
    """The format of every row of a table, uint8."""
    if packed.components_of(t) is not None:
        stored = torch.cat([packed.locate(t, ids).coding != 0 for ids in _chunks(packed, t)])
        return torch.where(stored, coded_format, ZERO_BITS).to(torch.uint8)
    of_width = torch.tensor(_FORMAT_OF_WIDTH, dtype=torch.uint8)
    return torch.cat([of_width[_locate(packed, t, ids)[1].long()] for ids in _chunks(packed, t)])


def _locate(packed: PackedTables, t: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows of a table start in ``packed.weights``, and their widths, int64."""
    located = packed.locate(t, ids)
    return (located.starts >> 3) + packed.weights_offsets[t], located.coding


def _positions(formats: Tensor) -> Tensor:
    """The number of earlier rows of the same format, int32; 0 for 0 bits."""
    positions = torch.zeros(formats.numel(), dtype=torch.int32)
    for f in range(ZERO_BITS):
        rows = (formats == f).nonzero().squeeze(1)
        positions[rows] = torch.arange(rows.numel(), dtype=torch.int32)
    return positions


def _fill(packed: PackedTables, t: int, positions: Tensor, targets: dict[int, Tensor]) -> None:
    """Write the rows of a table to the rows of its sub-tables."""
    table = packed.tables[t]
    alpha = packed.alpha[int(packed.scale_index[t])]
    for ids in _chunks(packed, t):
        addresses, bits = _locate(packed, t, ids)
        for width in bits.unique().tolist():
            if width == 0:
                continue
            chosen = (bits == width).nonzero().squeeze(1)
            span = torch.arange(row_bytes(table.embedding_dim, width))
            codes = unpack_codes(packed.weights[addresses[chosen].unsqueeze(1) + span], width, table.embedding_dim)
            target = targets[_FORMAT_OF_WIDTH[width]]
            header = _scale_and_bias(table.name, width, alpha[width])
            payload = _format_codes(codes, _FORMAT_BITS[_FORMAT_OF_WIDTH[width]])
            rows = torch.cat([header.expand(chosen.numel(), -1), payload], dim=1)
            target[positions[ids[chosen]].long(), : rows.shape[1]] = rows


def _fill_decoded(packed: PackedTables, t: int, formats: Tensor, positions: Tensor, targets: dict[int, Tensor]) -> None:
    """Write the rows of a coded table that have more than 0 bits to its one sub-table."""
    table, tensors = packed.tables[t], cast(dict[str, Any], packed.tensors())
    for chunk in _chunks(packed, t):
        ids = chunk[formats[chunk] != ZERO_BITS]
        if not ids.numel():
            continue
        rows = packed_embedding_bag(
            **tensors,
            D_offsets=[0, table.embedding_dim],
            feature_table_map=[t],
            pooling_mode=[0],
            indices=ids,
            offsets=torch.arange(ids.numel() + 1),
            backend="reference",
        )
        # Repeated elements leave a row's range as it is.
        rows = torch.cat([rows, rows[:, :1].expand(-1, -table.embedding_dim % 4)], dim=1)
        (kind,) = targets
        quantized = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, _FORMAT_BITS[kind])
        codes, header = quantized.split([quantized.shape[1] - 4, 4], dim=1)
        if not bool(header.contiguous().view(torch.float16).isfinite().all()):
            raise ValueError(f"table {table.name}: the scale or bias of a decoded row is out of float16's range")
        targets[kind][positions[ids].long(), : quantized.shape[1]] = torch.cat([header, codes], dim=1)


def _scale_and_bias(table: str, bits: int, alpha: Tensor) -> Tensor:
    """The 4 bytes in front of each row of a width: float16 scale and bias."""
    scale = alpha.to(torch.float16)
    # A power of two times a float16 is exact, so that both round alike and the middle code stays 0.
    bias = -(1 << (bits - 1)) * scale
    if float(scale) <= 0.0 or not bool(bias.isfinite()):
        raise ValueError(f"table {table}: the step size {float(alpha)} of {bits} bits is out of float16's range")
    return torch.stack([scale, bias]).view(torch.uint8)


def _format_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes as FBGEMM packs them, the first element of a byte in its lowest bits; uint8 [n, D / (8 / bits)]."""
    padding = -codes.shape[1] % 4
    codes = torch.nn.functional.pad(codes, (0, padding))
    if bits == 8:
        return codes
    per_byte = codes.view(codes.shape[0], -1, 8 // bits)
    packed = torch.zeros(per_byte.shape[:2], dtype=torch.uint8)
    for j in range(8 // bits):
        packed |= per_byte[:, :, j] << (j * bits)
    return packed
