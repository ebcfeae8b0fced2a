"""New values for rows of transform-coded tables, in place: encoded as when the table was packed."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchrec_mpe.ops.reference.bitpack import pack_codes
from torchrec_mpe.ops.reference.component_codes import write_codes_
from torchrec_mpe.ops.update_rows import update_rows_
from torchrec_mpe.packing.encode import encode
from torchrec_mpe.packing.locate_rows import damaged_directory, locate_rows
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.read_coding import coding_of_table
from torchrec_mpe.packing.table_coding import PlainRows, TableCoding

_CHUNK_ROWS = 1 << 14

# Held from reading the bytes that rows share to writing them: of two updates none undoes the other.
_SHARED_BYTES = threading.Lock()


@dataclass(frozen=True)
class CodedRows:
    """Where rows of a coded table lie.

    Attributes:
        coding (TableCoding): of the table, on the CPU, without an order.
        ids (Tensor): int64 [n], no two alike.
        positions (Tensor): int64 [n], the position of each row's values.
        starts (Tensor): int64 [n], the bit of the weights where each row starts.
        runs (Tensor): int64 [n], its group in ``coding``.
    """

    coding: TableCoding
    ids: Tensor
    positions: Tensor
    starts: Tensor
    runs: Tensor


def check_encoder(packed: PackedTables, t: int, encoder: Tensor) -> None:
    """Refuse what is no encoder of a table, float32 [D, K].

    Raises:
        TypeError: naming the table, if it has another dtype.
        ValueError: naming the table, if it has another shape, or the table is not coded.
    """
    table, components = packed.tables[t], packed.components_of(t)
    if components is None:
        raise ValueError(f"table {table.name} is not coded and has an encoder")
    if encoder.dtype != torch.float32:
        raise TypeError(f"table {table.name}: its encoder must be float32, got {encoder.dtype}")
    shape = [table.embedding_dim, components]
    if list(encoder.shape) != shape:
        raise ValueError(f"table {table.name}: its encoder must be {shape}, got {list(encoder.shape)}")


def locate_coded_rows(
    packed: PackedTables, t: int, ids: Tensor, positions: Tensor, encoder: Tensor | None
) -> CodedRows:
    """Find rows of a coded table, whose bits are all its own.

    Args:
        packed (PackedTables): the tables.
        t (int): index of a coded table.
        ids (Tensor): int64 [n], rows of it, no two alike.
        positions (Tensor): int64 [n], the position of each row's values.
        encoder (Optional[Tensor]): float32 [D, K]; None will do for a table without components.

    Raises:
        TypeError: naming the table, if the encoder has another dtype.
        ValueError: naming the table, if its encoder is missing or has another shape, or a damaged directory leads
            outside the table's rows.
    """
    table, components = packed.tables[t], int(packed.components[t])
    if encoder is None:
        if components:
            raise ValueError(
                f"table {table.name} is transform-coded and its encoder is not here: update the collection that "
                "compress made or that load read with it, or give it as encoders[table]"
            )
        encoder = torch.empty(table.embedding_dim, 0)
    check_encoder(packed, t, encoder)
    stored = coding_of_table(packed, t, ordered=False, encoder=encoder.detach().cpu())
    coding = replace(stored, basis=stored.basis.cpu())
    runs = packed.runs(t, table.num_embeddings)
    base = torch.tensor([run.base for run in runs], device=ids.device)
    bits = torch.tensor([run.row_bits for run in runs], device=ids.device)
    end = base + bits * torch.tensor([run.rows for run in runs], device=ids.device)
    starts, _, run = locate_rows(packed, t, ids)
    if not bool((run >= 0).all()):
        raise damaged_directory(packed, t)
    inside = (starts >= base[run]) & (starts + bits[run] <= end[run])
    if not bool((inside | (bits[run] == 0)).all()):
        raise damaged_directory(packed, t)
    return CodedRows(coding, ids, positions, starts + int(packed.weights_offsets[t]) * 8, run)


@torch.no_grad()
def write_coded_rows_(packed: PackedTables, t: int, rows: CodedRows, values: Tensor) -> int:
    """Encode finite values, float32 [m, D], and write them over the rows' bits; returns how many rows have bits."""
    written = 0
    for g in rows.runs.unique().tolist():
        group = rows.coding.groups[g]
        if group.row_bits(rows.coding.embedding_dim) == 0:
            continue
        chosen = (rows.runs == g).nonzero().squeeze(1)
        chosen = chosen[rows.starts[chosen].argsort()]
        written += len(chosen)
        for part in chosen.split(_CHUNK_ROWS):
            of_part = values.detach()[rows.positions[part].to(values.device)].cpu()
            codes = encode(of_part, group, rows.coding, table=packed.tables[t].name, ids=rows.ids[part])
            if isinstance(group, PlainRows):
                packed_rows = pack_codes(codes, group.bits).to(packed.weights.device)
                update_rows_(packed.weights, rows.starts[part] >> 3, packed_rows)
            else:
                _write_bits(packed.weights, rows.starts[part], group.component_bits, codes.to(packed.weights.device))
    return written


def _write_bits(weights: Tensor, starts: Tensor, component_bits: Sequence[int], codes: Tensor) -> None:
    """Rows of one group, by increasing start, over their bits alone.

    Rows that share a byte are written one after the other, each as whole bytes with the bits of its neighbours as they
    are: a lookup between two writes finds all rows whole.
    """
    row_bits = sum(component_bits)
    # Between a row and the next of its turn lie 7 bits or more: they share no byte.
    turns = -(-7 // row_bits) + 1
    all_bits = torch.tensor([(1 << bits) - 1 for bits in component_bits], dtype=torch.uint8, device=weights.device)
    sizes = ((starts & 7) + row_bits + 7) >> 3
    with _SHARED_BYTES:
        for turn in range(turns):
            for size in sizes[turn::turns].unique().tolist():
                chosen = torch.arange(turn, len(starts), turns, device=starts.device)
                chosen = chosen[sizes[chosen] == size]
                first, bytes_of_row = starts[chosen] >> 3, torch.arange(size, device=starts.device)
                local = torch.arange(len(chosen), device=starts.device) * size * 8 + (starts[chosen] & 7)
                new, own = (torch.zeros(len(chosen) * size, dtype=torch.uint8, device=weights.device) for _ in range(2))
                write_codes_(new, local, component_bits, codes[chosen])
                write_codes_(own, local, component_bits, all_bits.expand(len(chosen), -1))
                old = weights[first.unsqueeze(1) + bytes_of_row]
                update_rows_(weights, first, old & ~own.view(-1, size) | new.view(-1, size))
