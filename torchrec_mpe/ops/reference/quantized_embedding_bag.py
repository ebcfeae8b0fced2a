"""Quantized and pooled embedding bags in pure PyTorch: the definition that every backend is tested against."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.ops.reference.expected_quantization import expected_quantization
from torchrec_mpe.ops.reference.fixed_quantization import fixed_quantization

MEAN = 1  # FBGEMM's PoolingMode.MEAN


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """``value``, whose gradient is multiplied by ``factor``."""
    if factor == 1:
        return value
    result: Tensor = _ScaleGradient.apply(value, factor)  # type: ignore[no-untyped-call]
    return result


def expected_embedding_bag(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    first_row: Sequence[int],
    num_rows: Sequence[int],
    table: Sequence[int],
    pooling_mode: Sequence[int],
    side_by_side: bool,
    row_group: Tensor,
    probabilities: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    candidate_bits: tuple[int, ...],
    gradient_scale: Tensor,
    per_sample_weights: Tensor | None,
    gradient_factor: float,
    index: Tensor | None = None,
    row_offsets: Tensor | None = None,
    quantize: Callable[..., Tensor] = expected_quantization,
) -> Tensor:
    """See :func:`.quantized_embedding_bag.expected_embedding_bag`; ``quantize`` is the op that quantizes rows."""
    rows_of = (offsets, bags_per_feature) if row_offsets is None else (row_offsets, [1] * len(table))
    row = row_numbers(ids, *rows_of, first_row, num_rows)
    table_of_row = _per_id(*rows_of, [table], len(ids))[0]
    quantized = quantize(
        rows,
        scale_gradient(probabilities, gradient_factor),
        row_group[row],
        scale_gradient(alpha, gradient_factor),
        scale_gradient(beta, gradient_factor),
        None if zero_rows is None else scale_gradient(zero_rows, gradient_factor),
        None if zero_rows is None else table_of_row,
        candidate_bits,
        gradient_scale,
    )
    if index is not None and row_offsets is not None:
        quantized = quantized[index.long() - row_offsets[0]]
    return _pool(quantized, offsets, bags_per_feature, pooling_mode, side_by_side, per_sample_weights)


def fixed_embedding_bag(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    first_row: Sequence[int],
    num_rows: Sequence[int],
    table: Sequence[int],
    pooling_mode: Sequence[int],
    side_by_side: bool,
    row_candidate: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    candidate_bits: tuple[int, ...],
    gradient_scale: Tensor,
    per_sample_weights: Tensor | None,
    gradient_factor: float,
    index: Tensor | None = None,
    row_offsets: Tensor | None = None,
    quantize: Callable[..., Tensor] = fixed_quantization,
) -> Tensor:
    """See :func:`.ops.quantized_embedding_bag.fixed_embedding_bag`; ``quantize`` is the op that quantizes the rows."""
    rows_of = (offsets, bags_per_feature) if row_offsets is None else (row_offsets, [1] * len(table))
    row = row_numbers(ids, *rows_of, first_row, num_rows)
    table_of_row = _per_id(*rows_of, [table], len(ids))[0]
    quantized = quantize(
        rows,
        row_candidate[row],
        scale_gradient(alpha, gradient_factor),
        scale_gradient(beta, gradient_factor),
        None if zero_rows is None else scale_gradient(zero_rows, gradient_factor),
        None if zero_rows is None else table_of_row,
        candidate_bits,
        gradient_scale,
    )
    if index is not None and row_offsets is not None:
        quantized = quantized[index.long() - row_offsets[0]]
    return _pool(quantized, offsets, bags_per_feature, pooling_mode, side_by_side, per_sample_weights)


def row_numbers(
    ids: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    first_row: Sequence[int],
    num_rows: Sequence[int],
) -> Tensor:
    """See :func:`torchrec_mpe.ops.quantized_embedding_bag.row_numbers`."""
    shift, limit = _per_id(offsets, bags_per_feature, [first_row, num_rows], len(ids))
    rows: Tensor = torch.where((ids >= 0) & (ids < limit), ids, 0) + shift.to(ids.dtype)
    return rows


def unique_ids(
    ids: Tensor, offsets: Tensor, bags_per_feature: Sequence[int], num_rows: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`torchrec_mpe.ops.quantized_embedding_bag.unique_ids`."""
    features = len(num_rows)
    valid = row_numbers(ids, offsets, bags_per_feature, [0] * features, num_rows).long()
    feature = _per_id(offsets, bags_per_feature, [range(features)], len(ids))[0]
    limit = max(num_rows, default=1)
    keys, inverse = torch.unique(feature * limit + valid, return_inverse=True)
    position = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(keys, len(ids)).scatter_reduce(0, inverse, position, "amin")
    order = first.argsort()
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
    counts = torch.bincount(keys // limit, minlength=features)
    row_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return (keys[order] % limit).to(ids.dtype), rank[inverse].to(torch.int32), row_offsets


def _per_id(
    offsets: Tensor, bags_per_feature: Sequence[int], per_feature: Sequence[Sequence[int]], num_ids: int
) -> Tensor:
    """Numbers of each feature repeated for its ids, int64 [len(per_feature), N]."""
    bounds = torch.tensor([0, *bags_per_feature], device=offsets.device).cumsum(0)
    numbers = torch.tensor(per_feature, dtype=torch.int64, device=offsets.device)
    repeated: Tensor = torch.repeat_interleave(numbers, offsets[bounds].diff().long(), dim=1, output_size=num_ids)
    return repeated


def _pool(
    quantized: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    pooling_mode: Sequence[int],
    side_by_side: bool,
    per_sample_weights: Tensor | None,
) -> Tensor:
    if per_sample_weights is not None:
        quantized = quantized * per_sample_weights.to(quantized.dtype).unsqueeze(1)
    lengths = offsets.diff().long()
    bag = torch.repeat_interleave(lengths, output_size=len(quantized))
    pooled = quantized.new_zeros(len(lengths), quantized.shape[1]).index_add(0, bag, quantized)
    if MEAN in pooling_mode:
        repeats = torch.tensor(bags_per_feature, device=quantized.device)
        mean = torch.tensor([mode == MEAN for mode in pooling_mode], device=quantized.device)
        divisor = torch.where(mean.repeat_interleave(repeats), lengths.clamp(min=1), 1)
        pooled = pooled / divisor.to(pooled.dtype).unsqueeze(1)
    if side_by_side and bags_per_feature:
        features, bags = len(bags_per_feature), bags_per_feature[0]
        pooled = pooled.view(features, bags, -1).transpose(0, 1).reshape(bags, -1)
    return pooled
