"""Sums of the rows of each segment, in a fixed order."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ROWS = 64
_PROGRAMS = 2048


@triton.jit(do_not_specialize=["num_segments", "splits"])
def _segment_sum_kernel(
    values,
    weight,
    order,
    bounds,
    partial,
    num_segments,
    splits,
    columns,
    WEIGHTED: tl.constexpr,  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_COLUMNS: tl.constexpr,  # noqa: N803
):
    segment = tl.program_id(0)
    split = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first = tl.load(bounds + segment)
    length = tl.load(bounds + segment + 1) - first
    begin = first + length * split // splits
    end = first + length * (split + 1) // splits
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=values.dtype.element_ty)
    for start in range(begin, end, BLOCK_ROWS):
        place = start + tl.arange(0, BLOCK_ROWS)
        row = tl.load(order + place, mask=place < end, other=0)
        mask = (place < end)[:, None] & (column < columns)[None, :]
        value = tl.load(values + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
        if WEIGHTED:
            value *= tl.load(weight + row, mask=place < end, other=0.0)[:, None]
        total += value
    position = (split.to(tl.int64) * num_segments + segment) * columns + column
    tl.store(partial + position, tl.sum(total, axis=0), mask=column < columns)


def segment_sum(values: Tensor, weight: Tensor | None, segment: Tensor, num_segments: int) -> Tensor:
    """``out[s] = sum_n weight[n] * values[n]`` over the rows n with ``segment[n] == s``, the same at every run.

    Rows are sorted by segment; each segment is cut into as many parts as fill a GPU, and the parts are added in order.

    Args:
        values (Tensor): float32 or float64 [N, C].
        weight (Optional[Tensor]): [N], dtype of ``values``; None: ones.
        segment (Tensor): integer [N], each in [0, num_segments), which is not checked.
        num_segments (int): S.

    Returns:
        Tensor: [S, C], dtype of ``values``.
    """
    rows, columns = values.shape
    if rows == 0 or columns == 0 or num_segments == 0:
        return values.new_zeros((num_segments, columns))
    values = values.contiguous()
    # int32 keys take half the passes of int64.
    in_order, order = torch.sort(segment.int(), stable=True)
    bounds = torch.searchsorted(in_order, torch.arange(num_segments + 1, dtype=torch.int32, device=segment.device))
    splits = max(1, min(triton.cdiv(rows, _BLOCK_ROWS), _PROGRAMS // num_segments))
    block_columns = min(triton.next_power_of_2(columns), 64)
    partial = torch.empty((splits, num_segments, columns), dtype=values.dtype, device=values.device)
    grid = (num_segments, splits, triton.cdiv(columns, block_columns))
    _segment_sum_kernel[grid](
        values,
        values if weight is None else weight.contiguous(),
        order,
        bounds,
        partial,
        num_segments,
        splits,
        columns,
        WEIGHTED=weight is not None,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_COLUMNS=block_columns,
    )
    return partial.sum(0)
