"""Quantized and pooled embedding bags in pure PyTorch: the definition that every backend is tested against."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchrec_mpe.ops.bags import MEAN, Arguments, Bags, Gradients
from torchrec_mpe.ops.reference.quantize_rows import RowsToQuantize, quantize_rows, quantize_rows_backward


def quantized_embedding_bag(a: Arguments, quantize: Callable[[RowsToQuantize], Tensor] = quantize_rows) -> Tensor:
    """The pooled embeddings, without a gradient; ``quantize`` quantizes the rows."""
    return _pool(_of_ids(quantize(_rows_to_quantize(a)), a.bags), a.bags)


def quantized_embedding_bag_backward(
    grad: Tensor,
    a: Arguments,
    weights_require_grad: bool,
    quantize: Callable[[RowsToQuantize], Tensor] = quantize_rows,
    quantize_backward: Callable[[Tensor, RowsToQuantize], Gradients] = quantize_rows_backward,
) -> Gradients:
    """From the gradient of the bags to that of every id's row, then on to what the rows are quantized with.

    Raises:
        ValueError: if the gradient's shape is not the output's.
    """
    bags, dim, features = a.bags, a.rows.shape[1], len(a.bags.table)
    shape = pooled_shape(a.rows, bags)
    if tuple(grad.shape) != shape:
        raise ValueError(f"grad must be {list(shape)} like the output, not {list(grad.shape)}")
    if bags.side_by_side and features:
        grad = grad.reshape(shape[0], features, dim).transpose(0, 1).reshape(shape[0] * features, dim)
    x = _rows_to_quantize(a)
    lengths = bags.offsets.diff().long()
    num_ids = len(bags.ids if bags.index is None else bags.index)
    of_id = (grad / _divisor(lengths, bags, grad.dtype)).repeat_interleave(lengths, dim=0, output_size=num_ids)
    of_weights = (of_id * _of_ids(quantize(x), bags)).sum(1) if weights_require_grad else None
    if bags.per_sample_weights is not None:
        of_id = of_id * bags.per_sample_weights.to(of_id.dtype).unsqueeze(1)
    position = _position(bags)
    of_quantized = of_id if position is None else torch.zeros_like(a.rows).index_add_(0, position, of_id)
    of, factor = quantize_backward(of_quantized, x), a.gradient_factor
    return of._replace(
        probabilities=None if of.probabilities is None else of.probabilities * factor,
        alpha=of.alpha * factor,
        beta=of.beta * factor,
        zero_rows=None if of.zero_rows is None else of.zero_rows * factor,
        per_sample_weights=of_weights,
    )


def pooled_shape(rows: Tensor, bags: Bags) -> tuple[int, int]:
    """The shape of the pooled embeddings."""
    features, count, dim = len(bags.bags_per_feature), sum(bags.bags_per_feature), rows.shape[1]
    return (count // features, features * dim) if bags.side_by_side and features else (count, dim)


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


def _rows_to_quantize(a: Arguments) -> RowsToQuantize:
    bags = a.bags
    features = len(bags.table)
    starts = (bags.offsets, bags.bags_per_feature) if bags.row_offsets is None else (bags.row_offsets, [1] * features)
    # int64: rows are counted through all tables.
    row = row_numbers(bags.ids.long(), *starts, bags.first_row, bags.num_rows)
    table = _per_id(*starts, [bags.table], len(row))[0]
    return RowsToQuantize(
        a.rows,
        a.row_map[row],
        a.probabilities,
        a.alpha,
        a.beta,
        a.zero_rows,
        table,
        tuple(a.candidate_bits),
        a.gradient_scale,
    )


def _position(bags: Bags) -> Tensor | None:
    """Where each id's row is, [N], if not in the order of the ids."""
    return None if bags.index is None or bags.row_offsets is None else bags.index.long() - bags.row_offsets[0]


def _of_ids(quantized: Tensor, bags: Bags) -> Tensor:
    position = _position(bags)
    return quantized if position is None else quantized[position]


def _divisor(lengths: Tensor, bags: Bags, dtype: torch.dtype) -> Tensor:
    """What each bag's sum is divided by, [bags, 1]."""
    repeats = torch.tensor(bags.bags_per_feature, dtype=torch.int64, device=lengths.device)
    mean = torch.tensor([mode == MEAN for mode in bags.pooling_mode], dtype=torch.bool, device=lengths.device)
    return torch.where(mean.repeat_interleave(repeats), lengths.clamp(min=1), 1).to(dtype).unsqueeze(1)


def _pool(quantized: Tensor, bags: Bags) -> Tensor:
    if bags.per_sample_weights is not None:
        quantized = quantized * bags.per_sample_weights.to(quantized.dtype).unsqueeze(1)
    lengths = bags.offsets.diff().long()
    bag = torch.repeat_interleave(lengths, output_size=len(quantized))
    pooled = quantized.new_zeros(len(lengths), quantized.shape[1]).index_add(0, bag, quantized)
    if MEAN in bags.pooling_mode:
        pooled = pooled / _divisor(lengths, bags, pooled.dtype)
    if bags.side_by_side and bags.bags_per_feature:
        features, count = len(bags.bags_per_feature), bags.bags_per_feature[0]
        pooled = pooled.view(features, count, -1).transpose(0, 1).reshape(count, -1)
    return pooled
