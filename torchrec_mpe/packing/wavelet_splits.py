"""Which splits the wavelet directory of a coded table has, and its bytes."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from torchrec_mpe.ops.directory import BITMAP_ROWS, LINE_BYTES, MAX_SPLITS, SPLIT_BYTES
from torchrec_mpe.ops.reference.wavelet_ranks import Split, read_splits

_MAX_LEVELS = 8
_LEVEL_BYTES = 1 / 32  # that a row of the table must save for a few rows to go through more splits

# A half: (), in the order of ids; None, int32 ranks; or the halves of a split with the place of the run between them.
_Tree = tuple[()] | None | tuple[int, "_Tree", "_Tree"]


def bitmap_bytes(rows: int) -> int:
    """Bytes of a bitmap's lines."""
    return -(-rows // BITMAP_ROWS) * LINE_BYTES


def remap_bytes(rows: int) -> int:
    """Bytes of the lines of an int32 a row."""
    return -(-4 * rows // LINE_BYTES) * LINE_BYTES


def wavelet_bytes(splits: Sequence[Split]) -> int:
    """Bytes of a wavelet directory; 0 without splits."""
    size = -(-len(splits) * SPLIT_BYTES // LINE_BYTES) * LINE_BYTES
    for split in splits:
        size += bitmap_bytes(split.rows)
        size += sum(remap_bytes(rows) for _, rows, following in split.halves if following < 0)
    return size


@lru_cache(maxsize=256)
def choose_splits(run_rows: tuple[int, ...]) -> tuple[Split, ...]:
    """The splits of a table's wavelet directory; work is per run.

    Runs are parted where the sum of rows' shares, and half of their shares of lookups by Zipf's law, is the same on
    either side: few bits a row, and few levels for those that are looked up most. Few rows get an int32 each.

    Args:
        run_rows (tuple[int, ...]): rows of each run, by rank.

    Returns:
        tuple[Split, ...]: the root first; none where an int32 a row takes no more bytes, and for a single run.
    """
    starts = (0, *accumulate(run_rows))
    rows = starts[-1]
    weights = [start / rows + 0.5 * math.log1p(start) / math.log1p(rows) for start in starts]

    def bytes_of(low: int, high: int, levels: int) -> tuple[float, _Tree]:
        """What the runs ``low`` to ``high - 1`` take, and their tree, at so many levels."""
        if high - low == 1:
            return 0, ()
        here = starts[high] - starts[low]
        ranks = remap_bytes(here)
        if levels == 0:
            return ranks, None
        middle = (weights[low] + weights[high]) / 2
        at = min(range(low + 1, high), key=lambda k: abs(weights[k] - middle))
        (below, lower), (above, upper) = bytes_of(low, at, levels - 1), bytes_of(at, high, levels - 1)
        size = SPLIT_BYTES + bitmap_bytes(here) + below + above
        if ranks <= size + (rows * _LEVEL_BYTES if levels < _MAX_LEVELS else 0):
            return ranks, None
        return size, (at, lower, upper)

    _, tree = bytes_of(0, len(run_rows), _MAX_LEVELS)
    splits: list[Split] = []
    following = 0

    def place(tree: _Tree, low: int, high: int) -> int:
        """Append a half's splits; where its rows go on, -1 for int32 ranks that have no line yet."""
        if not tree:
            return 0 if tree == () else -1
        at, lower, upper = tree
        own = len(splits)
        splits.append(Split(starts[low], starts[high] - starts[low], starts[at] - starts[low], 0, 0, 0))
        splits[own] = splits[own]._replace(next_set=place(lower, low, at))
        splits[own] = splits[own]._replace(next_rest=place(upper, at, high))
        return own

    place(tree, 0, len(run_rows))
    if not splits or len(splits) > MAX_SPLITS:
        return ()
    following = -(-len(splits) * SPLIT_BYTES // LINE_BYTES)
    for k, split in enumerate(splits):
        line, following = following, following + bitmap_bytes(split.rows) // LINE_BYTES
        goes_on = []
        for _, count, there in split.halves:
            goes_on.append(there if there >= 0 else -following)
            following += remap_bytes(count) // LINE_BYTES if there < 0 else 0
        splits[k] = split._replace(line=line, next_set=goes_on[0], next_rest=goes_on[1])
    return tuple(splits) if following * LINE_BYTES < remap_bytes(rows) else ()


def levels_of(splits: Sequence[Split]) -> int:
    """Splits that a row meets at most."""
    levels = [1] * len(splits)
    for k, split in enumerate(splits):
        for _, _, there in split.halves:
            if there > 0:
                levels[there] = levels[k] + 1
    return max(levels)


def splits_of_table(lines: Tensor, rows: int, name: str) -> tuple[Split, ...]:
    """The splits of a table's wavelet directory.

    Args:
        lines (Tensor): uint8, from its first byte on.
        rows (int): of the table.
        name (str): table.

    Raises:
        ValueError: naming the table, unless each split halves what another one leads to, and all are laid out one after
            another.
    """
    try:
        splits = read_splits(lines)
    except ValueError as error:
        raise ValueError(f"table {name}: {error}") from None
    expected = {0: (0, rows)}
    following = -(-len(splits) * SPLIT_BYTES // LINE_BYTES)
    for k, split in enumerate(splits):
        fits = expected.pop(k, None) == (split.first, split.rows) and 0 < split.kept < split.rows
        fits &= split.line == following
        following += bitmap_bytes(split.rows) // LINE_BYTES
        for first, count, there in split.halves:
            if there > 0:
                fits &= k < there < len(splits) and there not in expected
                expected[there] = first, count
            elif there < 0:
                fits &= there == -following
                following += remap_bytes(count) // LINE_BYTES
        if not fits:
            raise ValueError(f"table {name}: split {k} of its directory does not follow from those before it")
    root = lines[24:32].cpu().clone().view(torch.int32).tolist()
    if expected or root != [len(splits), levels_of(splits)]:
        raise ValueError(f"table {name}: the splits of its directory are not those that it has")
    return splits
