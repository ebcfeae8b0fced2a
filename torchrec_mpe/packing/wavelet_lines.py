"""The bytes of wavelet directories, written a few MiB at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchrec_mpe.ops.directory import LINE_BYTES, SPLIT_BYTES
from torchrec_mpe.ops.reference.wavelet_ranks import Split
from torchrec_mpe.packing.directory_lines import write_bitmap
from torchrec_mpe.packing.table_coding import TableCoding
from torchrec_mpe.packing.wavelet_splits import bitmap_bytes, levels_of

_CHUNK_ROWS = 1 << 20


def stored_ranks(coding: TableCoding) -> Tensor:
    """Stored ranks by id, int32 [num_embeddings], of a table whose runs have their rows in the order of ids."""
    assert coding.order is not None
    following = torch.tensor(coding.bounds[:-1])
    bounds = torch.tensor(coding.bounds[1:], dtype=coding.order.dtype)
    ranks = torch.empty(coding.num_embeddings, dtype=torch.int32)
    for start in range(0, coding.num_embeddings, _CHUNK_ROWS):
        group = torch.searchsorted(bounds, coding.order[start : start + _CHUNK_ROWS].cpu(), right=True)
        by_group = group.argsort(stable=True)
        counts = torch.bincount(group, minlength=len(following))
        within = torch.arange(len(group)) - (counts.cumsum(0) - counts)[group[by_group]]
        ranks[start + by_group] = (following[group[by_group]] + within).int()
        following += counts
    return ranks


def write_wavelet(ranks: Tensor, splits: Sequence[Split], out: Tensor) -> None:
    """Write a wavelet directory.

    Args:
        ranks (Tensor): int32 [rows], stored ranks by id; rows of a run in the order of ids.
        splits (Sequence[Split]): at least one.
        out (Tensor): uint8, zeros of :func:`wavelet_bytes`.
    """
    records = out[: len(splits) * SPLIT_BYTES].view(torch.int32).view(len(splits), -1)
    records[:, :6] = torch.tensor(splits, dtype=torch.int32)
    records[0, 6:] = torch.tensor([len(splits), levels_of(splits)], dtype=torch.int32)
    lines = out.view(-1, LINE_BYTES)
    for split in splits:
        bits = ((part < split.first + split.kept).to(torch.uint8) for part in _between(ranks, split.first, split.rows))
        write_bitmap(bits, lines[split.line : split.line + bitmap_bytes(split.rows) // LINE_BYTES])
        for first, rows, there in split.halves:
            if there < 0:
                target = lines[-there:].flatten().view(torch.int32)
                start = 0
                for part in _between(ranks, first, rows):
                    target[start : start + len(part)] = part
                    start += len(part)


def _between(ranks: Tensor, first: int, rows: int) -> Iterator[Tensor]:
    """The ranks from ``first`` on, a few MiB at a time."""
    for part in ranks.split(_CHUNK_ROWS):
        yield part[(part >= first) & (part < first + rows)]
