"""The frequency order of rows, and values per segment of it spread over the rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS_PER_CHUNK = 1 << 20


def rows_from_segments(
    bounds: Sequence[int],
    values: Sequence[int],
    order: Tensor | None,
    dtype: torch.dtype,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """The values of the rows ``start`` to ``stop`` of a table; nothing of the size of the whole table is made.

    Args:
        bounds (Sequence[int]): k + 1 increasing places, from 0 to num_embeddings.
        values (Sequence[int]): of the k segments; segment s holds the places ``bounds[s] <= place < bounds[s + 1]``.
        order (Optional[Tensor]): int32 [num_embeddings], the place of each row; None when ids are in order.
        dtype (torch.dtype): of the result.
        start (int): first row.
        stop (Optional[int]): last row, exclusive; num_embeddings by default.

    Returns:
        Tensor: [stop - start], indexed by row id less ``start``.

    Example::

        rows_from_segments((0, 1, 3), (6, 2), torch.tensor([2, 0, 1], dtype=torch.int32), torch.uint8)
        # tensor([2, 6, 2], dtype=torch.uint8)
    """
    stop = bounds[-1] if stop is None else stop
    of_segment = torch.tensor(values, dtype=dtype)
    if order is None:
        return torch.repeat_interleave(of_segment, torch.tensor(bounds).clamp(start, stop).diff())
    inner = torch.tensor(bounds[1:-1], dtype=order.dtype, device=order.device)
    segment = torch.searchsorted(inner, order[start:stop], right=True, out_int32=True)
    return of_segment.to(order.device)[segment]


def is_permutation(values: Tensor) -> bool:
    """Whether each of the numbers 0 to n - 1 is once in ``values``, integer [n]; takes a byte a row, and no more."""
    seen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    for chunk in values.split(_ROWS_PER_CHUNK):
        if len(chunk) and (int(chunk.min()) < 0 or int(chunk.max()) >= len(values)):
            return False
        seen[chunk.long()] = True
    return bool(seen.all())
