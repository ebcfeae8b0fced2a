"""The coding of a packed table, from its tensors."""

import torch
from torch import Tensor

from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.reference.run_coding import block_bits, level_count
from torchrec_mpe.ops.reference.wavelet_ranks import wavelet_ranks
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.table_coding import PlainRows, RowCoding, TableCoding, TransformedRows

_CHUNK_ROWS = 1 << 14


def coding_of_table(
    packed: PackedTables, t: int, *, ordered: bool = True, encoder: Tensor | None = None
) -> TableCoding:
    """The coding of a coded table; work is per run, and per row if its ids are not in the frequency order.

    Args:
        packed (PackedTables): validated, on the CPU.
        t (int): index of a coded table.
        ordered (bool): False: without the order of its ids, whatever its directory.
        encoder (Optional[Tensor]): float32 [D, K], what encodes a row, which is not stored; None: the pseudo-inverse
            of the basis, which gives a row's nearest components.

    Returns:
        TableCoding: whose packed bytes are those of the table.
    """
    table, components = packed.tables[t], packed.components_of(t)
    assert components is not None
    following = int(packed.levels_offsets[t])
    groups: list[RowCoding] = []
    runs = packed.runs(t, table.num_embeddings)
    for run in runs:
        count = level_count(run.coding, components)
        levels = packed.levels[following : following + count].tolist()
        following += count
        if run.is_transformed:
            groups.append(TransformedRows(block_bits(run.coding), tuple(levels[::2]), tuple(levels[1::2]), components))
        else:
            groups.append(PlainRows(run.bits, *levels))
    basis, zero = packed.basis(t), int(packed.zero_row_offsets[t])
    order = stored_order(packed, t) if ordered else None
    return TableCoding(
        table.num_embeddings,
        table.embedding_dim,
        (*(run.first for run in runs), table.num_embeddings),
        tuple(groups),
        basis,
        torch.linalg.pinv(basis[:-1].double()).float() if encoder is None else encoder,
        None if zero < 0 else packed.zero_rows[zero : zero + table.embedding_dim],
        order,
    )


def stored_order(packed: PackedTables, t: int) -> Tensor | None:
    """The stored rank of each row of a coded table, int32 [num_embeddings]; None: ids are it."""
    rows, start = packed.tables[t].num_embeddings, int(packed.directory_offsets[t])
    directory = packed.directory[start:]
    match Directory(int(packed.directory_kinds[t])):
        case Directory.REMAP:
            return directory[: 4 * rows].view(torch.int32)
        case Directory.WAVELET:
            ids = torch.arange(rows).split(_CHUNK_ROWS)
            return torch.cat([wavelet_ranks(chunk, directory).int() for chunk in ids])
    return None
