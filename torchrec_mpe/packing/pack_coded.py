"""The rows of a transform-coded table to packed codes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.reference.bitpack import pack_codes
from torchrec_mpe.ops.reference.component_codes import write_codes_
from torchrec_mpe.packing.encode import encode
from torchrec_mpe.packing.layout import TableLayout
from torchrec_mpe.packing.packed_tables import int32_tensor
from torchrec_mpe.packing.table_coding import PlainRows, TableCoding
from torchrec_mpe.packing.wavelet_lines import stored_ranks, write_wavelet


@dataclass(frozen=True)
class CodedTableToPack:
    """A table's rows and their coding.

    Attributes:
        name (str): table.
        coding (TableCoding): of every row.
        pieces (Callable[[], Iterable[tuple[int, Tensor]]]): the rows that this process has, a few MiB at a time: the id
            of the first row, and float32 [n, D], on any device. Rows that all processes leave out have codes of 0.
        sum_over_ranks (Optional[Callable[[Tensor], Tensor]]): the sum of a uint8 tensor over the processes that each
            have a part of the rows; every one of them calls :func:`pack_tables`. None: this one has all rows.
        directory (str): "ranked", "remap", "wavelet", or "auto": ranked where ids are in the frequency order or all
            rows are of one group, else the smallest.
    """

    name: str
    coding: TableCoding
    pieces: Callable[[], Iterable[tuple[int, Tensor]]]
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    directory: str = "auto"


def write_coded_directory(coding: TableCoding, layout: TableLayout, out: Tensor) -> Tensor | None:
    """Write a coded table's part of the directory, zeros of ``layout.directory_bytes``.

    Returns:
        Optional[Tensor]: int32 [num_embeddings], the stored rank of each row; None: ids.
    """
    if layout.directory == Directory.RANKED:
        return None
    assert coding.order is not None
    if layout.directory == Directory.REMAP:
        out.view(torch.int32).copy_(coding.order)
        return coding.order
    ranks = stored_ranks(coding)
    write_wavelet(ranks, layout.splits, out)
    return ranks


def pack_coded_rows_(table: CodedTableToPack, layout: TableLayout, ranks: Tensor | None, weights: Tensor) -> None:
    """Encode a table's rows into its part of the weights, zeros of ``layout.end`` bytes.

    ``ranks`` are those of :func:`write_coded_directory`.

    Raises:
        ValueError: naming the table, if rows have another shape or dtype, or those with bits hold NaN or infinity.
    """
    coding = table.coding
    bounds = torch.tensor(coding.bounds[1:], dtype=torch.int64)
    for first, rows in table.pieces():
        stop = first + len(rows)
        if rows.dtype != torch.float32 or rows.shape[1:] != (coding.embedding_dim,) or stop > coding.num_embeddings:
            raise ValueError(
                f"table {table.name}: rows from {first} on must be float32 [n, {coding.embedding_dim}] of its "
                f"{coding.num_embeddings} rows, got {rows.dtype} {list(rows.shape)}"
            )
        places = torch.arange(first, stop) if ranks is None else ranks[first:stop].cpu().long()
        groups = torch.searchsorted(bounds, places, right=True)
        for g in groups.unique().tolist():
            group, run = coding.groups[g], layout.runs[g]
            if run.row_bits == 0:
                continue
            chosen = (groups == g).nonzero().squeeze(1)
            of_group = rows[chosen.to(rows.device)].detach().cpu()
            codes = encode(of_group, group, coding, table=table.name, ids=first + chosen)
            starts = run.base + (places[chosen] - run.first) * run.row_bits
            if isinstance(group, PlainRows):
                packed = pack_codes(codes, group.bits)
                weights[(starts >> 3).unsqueeze(1) + torch.arange(packed.shape[1])] = packed
            else:
                write_codes_(weights, starts, group.component_bits, codes)
    if table.sum_over_ranks is not None:
        # A bit is set by one process at most: the sum is what all have set.
        weights.copy_(table.sum_over_ranks(weights))


def coding_tensors(codings: Sequence[TableCoding | None]) -> dict[str, Tensor]:
    """Levels and bases of a collection's tables, None for those that are not coded."""
    levels: list[float] = []
    bases: list[Tensor] = [torch.empty(0, dtype=torch.float16)]
    levels_offsets: list[int] = []
    bases_offsets: list[int] = []
    for coding in codings:
        levels_offsets.append(-1 if coding is None else len(levels))
        bases_offsets.append(-1 if coding is None else sum(basis.numel() for basis in bases))
        if coding is not None:
            levels += [level for group in coding.groups for level in group.levels]
            bases.append(coding.basis.cpu().flatten())
    return {
        "levels": torch.tensor(levels, dtype=torch.bfloat16),
        "levels_offsets": int32_tensor(levels_offsets),
        "bases": torch.cat(bases),
        "bases_offsets": int32_tensor(bases_offsets),
        "components": int32_tensor([0 if coding is None else coding.components for coding in codings]),
    }
