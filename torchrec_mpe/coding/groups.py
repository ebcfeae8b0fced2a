"""The groups of a table's frequency order before any is merged or split."""

import math
from bisect import bisect_left
from collections.abc import Iterator

from torch import Tensor

_FEWEST_ROWS = 8


def count_bounds(ordered: Tensor) -> tuple[int, ...]:
    """Bounds of groups of rows of similar counts, of the rows that have been looked up.

    The frequency order is cut where the count falls below 2, 3, 4, 6, 8, 11, ..., each from 4 on being the square root
    of 2 times the one before. Groups of fewer than 8 rows are joined to the next, the last to the one before it.

    Args:
        ordered (Tensor): [num_embeddings], counts that never increase.

    Returns:
        Tuple[int, ...]: increasing places, from 0 to the number of rows with a count above 0; (0,) if there are none.

    Example::

        count_bounds(torch.tensor([9] * 10 + [1] * 10 + [0] * 5))   # (0, 10, 20)
    """
    seen = _places_of(ordered, math.ulp(0.0))
    if seen == 0:
        return (0,)
    cuts = sorted({*(_places_of(ordered, t) for t in _thresholds(float(ordered[0]))), seen})
    bounds = [0]
    for cut in cuts:
        if cut - bounds[-1] >= _FEWEST_ROWS:
            bounds.append(cut)
    if len(bounds) == 1:
        bounds.append(seen)
    bounds[-1] = seen
    return tuple(bounds)


def _places_of(ordered: Tensor, threshold: float) -> int:
    """Rows with a count of at least ``threshold``; nothing of the size of the table is made."""
    return bisect_left(range(len(ordered)), True, key=lambda place: float(ordered[place]) < threshold)


def _thresholds(largest: float) -> Iterator[int]:
    """2, 3, and from 4 on powers of the square root of 2, rounded, as far as the largest count."""
    yield from (2, 3)
    power = 4
    while (threshold := round(math.sqrt(2) ** power)) <= largest:
        yield threshold
        power += 1
