"""From ids to stored ranks by a wavelet directory, in pure PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_mpe.ops.directory import BITMAP_ROWS, LINE_BYTES, MAX_SPLITS, SPLIT_BYTES


class Split(NamedTuple):
    """Neighbouring stored ranks in two halves, see :class:`torchrec_mpe.ops.directory.Directory`.

    Attributes:
        first, rows (int): its lowest rank, and how many it has.
        kept (int): rows of the lower half, whose bits are set.
        line (int): its first line of 64 bytes, counted from the root's.
        next_set, next_rest (int): where rows of the lower and the upper half go on: a split; 0: ranks in the order of
            ids; -n: to int32 ranks from line n on.
    """

    first: int
    rows: int
    kept: int
    line: int
    next_set: int
    next_rest: int

    @property
    def halves(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """First rank, rows, and where they go on, of either half."""
        return (self.first, self.kept, self.next_set), (self.first + self.kept, self.rows - self.kept, self.next_rest)


def read_splits(directory: Tensor) -> tuple[Split, ...]:
    """The splits of a wavelet directory.

    Args:
        directory (Tensor): uint8, from the first byte of the table's part on.

    Raises:
        ValueError: if the number of splits, or of those that a row meets, is none.
    """
    if directory.numel() < LINE_BYTES:
        raise ValueError("a wavelet directory has a line at least")
    count, levels = directory[24:32].cpu().clone().view(torch.int32).tolist()
    if not 1 <= count <= MAX_SPLITS or not 1 <= levels <= count or count * SPLIT_BYTES > directory.numel():
        raise ValueError(f"{count} splits, of which a row meets {levels}, are no wavelet directory")
    records = directory[: count * SPLIT_BYTES].cpu().clone().view(torch.int32).view(count, -1).tolist()
    return tuple(Split(*record[:6]) for record in records)


def bits_and_ranks(lines: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of a bitmap's rows, whether each one's bit is set, and the set bits before it.

    Args:
        lines (Tensor): uint8 [lines, 64].
        rows (Tensor): int64 [n].
    """
    of_rows = lines[rows // BITMAP_ROWS]
    position = (rows % BITMAP_ROWS).unsqueeze(1)
    rank = of_rows[:, :8].contiguous().view(torch.int64).squeeze(1)
    place = torch.arange(8, dtype=torch.uint8, device=rows.device)
    bits = (of_rows[:, 8:].unsqueeze(2) >> place & 1).flatten(1)
    before = torch.arange(BITMAP_ROWS, device=rows.device) < position
    return bits.gather(1, position).squeeze(1).bool(), rank + (bits * before).sum(1)


def wavelet_ranks(ids: Tensor, directory: Tensor) -> Tensor:
    """Stored ranks, int64 [n], of ids int64 [n], none of which is checked.

    Raises:
        ValueError: if the directory is none.
        IndexError: if it leads outside of itself.
    """
    lines = directory[: directory.numel() // LINE_BYTES * LINE_BYTES].view(-1, LINE_BYTES)
    ranks = torch.empty_like(ids)
    splits = read_splits(directory)
    at = {0: (torch.arange(len(ids), device=ids.device), ids)}  # of each split the ids that meet it, and their rows
    for k, split in enumerate(splits):
        if k not in at:
            continue
        which, rows = at.pop(k)
        is_set, kept = bits_and_ranks(lines[split.line :], rows)
        chosen = (is_set, kept), (~is_set, rows - kept)
        for (first, _, following), (mask, positions) in zip(split.halves, chosen, strict=True):
            own, row = which[mask], positions[mask]
            if following > k:
                at[following] = own, row
            elif following == 0:
                ranks[own] = first + row
            elif following > 0:
                raise IndexError(f"split {k} leads back to split {following}")
            else:
                ranks[own] = lines[-following:].flatten().view(torch.int32)[row].long()
    return ranks
