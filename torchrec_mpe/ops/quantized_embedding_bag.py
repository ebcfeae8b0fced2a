"""Quantize and pool in one op: looked-up rows in, pooled embeddings of quantized rows out."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.ops import library, triton_backend
from torchrec_mpe.ops.backends import implementation, register
from torchrec_mpe.ops.quantization import check_candidates, expected_quantization, fake_gradients, fixed_quantization
from torchrec_mpe.ops.reference import quantized_embedding_bag as reference


def expected_embedding_bag(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    first_row: Sequence[int],
    num_rows: Sequence[int],
    table: Sequence[int],
    pooling_mode: Sequence[int],
    row_group: Tensor,
    probabilities: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
    per_sample_weights: Tensor | None = None,
    index: Tensor | None = None,
    row_offsets: Tensor | None = None,
    *,
    gradient_factor: float = 1,
    side_by_side: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Pool the bags of F features over rows quantized by :func:`torchrec_mpe.ops.quantization.expected_quantization`.

    Row n, of feature f, belongs to the group ``row_group[first_row[f] + ids[n]]`` and the table ``table[f]``. An id
    that is not in ``[0, num_rows[f])`` counts as 0, which is the row that FBGEMM reads for it. An empty bag is zeros.

    With the ``index`` and ``row_offsets`` of :func:`unique_ids`, ``rows`` and ``ids`` are those of each feature's
    distinct ids, U in all, which are quantized once: the same result, in less time where ids repeat.

    Args:
        rows (Tensor): [N, D], float32 or float64, the rows of all ids.
        ids (Tensor): int32 or int64 [N], feature after feature, bag after bag.
        offsets (Tensor): int32 or int64 [bags + 1], where each bag starts in ``ids``; counted from ``offsets[0]``.
        bags_per_feature (Sequence[int]): F numbers, their sum is the number of bags.
        first_row (Sequence[int]): F numbers, where the feature's table (or shard of it) starts in ``row_group``.
        num_rows (Sequence[int]): F numbers, rows of the feature's table or shard.
        table (Sequence[int]): F numbers, the line of ``zero_rows`` of the feature's table.
        pooling_mode (Sequence[int]): F of FBGEMM's PoolingMode values, 0 SUM or 1 MEAN; MEAN divides by the number of
            ids of the bag, weighted or not.
        row_group (Tensor): integer [rows of all tables], the feature group of each row.
        probabilities, alpha, beta, zero_rows, candidate_bits, gradient_scale: as in
            :func:`torchrec_mpe.ops.quantization.expected_quantization`.
        per_sample_weights (Optional[Tensor]): floating point [N].
        index (Optional[Tensor]): integer [N], where each id is among the distinct ones, counted from
            ``row_offsets[0]``; then ``rows`` is [U, D] and ``ids`` is [U].
        row_offsets (Optional[Tensor]): integer [F + 1], where each feature's distinct ids start.
        gradient_factor (float): multiplies the gradients of probabilities, alpha, beta and zero_rows.
        side_by_side (bool): the bags of the features beside each other, as in a KeyedTensor; every feature must have
            the same number B of bags.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Returns:
        Tensor: [bags, D], or [B, F * D] if ``side_by_side``, dtype of ``rows``.

    Raises:
        IndexError: if a group, a table number or a feature's rows are out of range.
        TypeError: if the floating point tensors but the weights differ in dtype.
        ValueError: if shapes do not fit, a feature has a negative number of bags, offsets decrease or do not span the
            ids, or a candidate bit-width is repeated or not in 0 to 8.
    """
    _check_bags(bags_per_feature)
    run = implementation("expected_embedding_bag", backend)
    result: Tensor = run(
        rows,
        ids,
        offsets,
        bags_per_feature,
        first_row,
        num_rows,
        table,
        pooling_mode,
        side_by_side,
        row_group,
        probabilities,
        alpha,
        beta,
        zero_rows,
        check_candidates(candidate_bits),
        gradient_scale,
        per_sample_weights,
        gradient_factor,
        index,
        row_offsets,
    )
    return result


def fixed_embedding_bag(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    first_row: Sequence[int],
    num_rows: Sequence[int],
    table: Sequence[int],
    pooling_mode: Sequence[int],
    row_candidate: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
    per_sample_weights: Tensor | None = None,
    index: Tensor | None = None,
    row_offsets: Tensor | None = None,
    *,
    gradient_factor: float = 1,
    side_by_side: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Pool the bags of F features over rows quantized by :func:`torchrec_mpe.ops.quantization.fixed_quantization`.

    Args:
        row_candidate (Tensor): integer [rows of all tables], the index into ``candidate_bits`` of each row's bit-width.
        others: as in :func:`expected_embedding_bag`.

    Returns:
        Tensor: [bags, D], or [B, F * D] if ``side_by_side``, dtype of ``rows``.

    Raises:
        IndexError, TypeError, ValueError: as :func:`expected_embedding_bag`.
    """
    _check_bags(bags_per_feature)
    run = implementation("fixed_embedding_bag", backend)
    result: Tensor = run(
        rows,
        ids,
        offsets,
        bags_per_feature,
        first_row,
        num_rows,
        table,
        pooling_mode,
        side_by_side,
        row_candidate,
        alpha,
        beta,
        zero_rows,
        check_candidates(candidate_bits),
        gradient_scale,
        per_sample_weights,
        gradient_factor,
        index,
        row_offsets,
    )
    return result


def row_numbers(
    ids: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    first_row: Sequence[int],
    num_rows: Sequence[int],
    *,
    backend: str | None = None,
) -> Tensor:
    """Each id's row, counted through the tables: ``first_row[f] + id``, or ``first_row[f]`` for an id outside.

    Args:
        ids, offsets, bags_per_feature, first_row, num_rows: as in :func:`expected_embedding_bag`.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Returns:
        Tensor: [N], dtype of ``ids``.

    Raises:
        ValueError: if the offsets do not fit the ids, a feature has a negative number of bags, or its rows do not fit
            the dtype of ``ids``.
    """
    _check_bags(bags_per_feature)
    largest = torch.iinfo(ids.dtype).max
    for f, (first, rows) in enumerate(zip(first_row, num_rows, strict=True)):
        if first < 0 or rows < 0 or first + rows > largest:
            raise ValueError(f"feature {f} has {rows} rows from {first}, which do not fit {ids.dtype} ids")
    run = implementation("row_numbers", backend)
    result: Tensor = run(ids, offsets, bags_per_feature, first_row, num_rows)
    return result


def unique_ids(
    ids: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    num_rows: Sequence[int],
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each feature's distinct ids, in the order of their first appearance.

    Args:
        ids, offsets, bags_per_feature, num_rows: as in :func:`expected_embedding_bag`; an id outside counts as 0.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Returns:
        Tuple[Tensor, Tensor, Tensor]: the distinct ids, [U], dtype of ``ids``; int32 [N], where each id is among them;
        int64 [F + 1], where each feature's start.

    Raises:
        ValueError: if the offsets do not fit the ids, or a feature has a negative number of bags.
    """
    _check_bags(bags_per_feature)
    run = implementation("unique_ids", backend)
    result: tuple[Tensor, Tensor, Tensor] = run(ids, offsets, bags_per_feature, num_rows)
    return result


def _check_bags(bags_per_feature: Sequence[int]) -> None:
    for f, bags in enumerate(bags_per_feature):
        if bags < 0:
            raise ValueError(f"feature {f} has {bags} bags")


def _compiled(op: str, *arguments: Any) -> Any:
    """The op of the library: C++ on CPU tensors, PyTorch and Triton on CUDA tensors, shapes only on meta tensors."""
    return getattr(torch.ops.torchrec_mpe, op)(*arguments)


def _fake_forward(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    first_row: Sequence[int],
    num_rows: Sequence[int],
    table: Sequence[int],
    pooling_mode: Sequence[int],
    side_by_side: bool,
    *arguments: Any,
) -> Tensor:
    if side_by_side and bags_per_feature:
        return rows.new_empty(bags_per_feature[0], len(bags_per_feature) * rows.shape[1])
    return rows.new_empty(sum(bags_per_feature), rows.shape[1])


def _fake_row_numbers(ids: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(ids)


def _fake_unique_ids(
    ids: Tensor, offsets: Tensor, bags_per_feature: Sequence[int], num_rows: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    distinct = torch.library.get_ctx().new_dynamic_size()
    return (
        ids.new_empty(distinct),
        ids.new_empty(ids.shape, dtype=torch.int32),
        ids.new_empty(len(bags_per_feature) + 1, dtype=torch.int64),
    )


# Where the tensors of a forward op are among its arguments; the others are numbers.
_EXPECTED_TENSORS = (0, 1, 2, 9, 10, 11, 12, 13, 15, 16, 18, 19)
_FIXED_TENSORS = (0, 1, 2, 9, 10, 11, 12, 14, 15, 17, 18)


def _fake_expected_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    rows, probabilities, alpha, beta, zero_rows = (arguments[k] for k in (0, 10, 11, 12, 13))
    weights = arguments[16] if arguments[-1] else None
    return fake_gradients(rows, probabilities, alpha, beta, zero_rows, weights)


def _fake_fixed_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    rows, alpha, beta, zero_rows = (arguments[k] for k in (0, 10, 11, 12))
    weights = arguments[15] if arguments[-1] else None
    return fake_gradients(rows, None, alpha, beta, zero_rows, weights)


def _save(positions: tuple[int, ...], ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(inputs[k] for k in positions))
    ctx.numbers = [None if k in positions else value for k, value in enumerate(inputs)]


def _arguments(positions: tuple[int, ...], ctx: Any) -> list[Any]:
    arguments = list(ctx.numbers)
    for k, tensor in zip(positions, ctx.saved_tensors, strict=True):
        arguments[k] = tensor
    return arguments


def _expected_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arguments = _arguments(_EXPECTED_TENSORS, ctx)
    of_rows, of_probabilities, of_alpha, of_beta, of_zero_rows, of_weights = (
        torch.ops.torchrec_mpe.expected_embedding_bag_backward(grad, *arguments, ctx.needs_input_grad[16])
    )
    gradients: list[Tensor | None] = [None] * len(arguments)
    gradients[0], gradients[10], gradients[11], gradients[12] = of_rows, of_probabilities, of_alpha, of_beta
    gradients[13] = None if arguments[13] is None else of_zero_rows
    gradients[16] = of_weights.to(arguments[16].dtype) if ctx.needs_input_grad[16] else None
    return tuple(gradients)


def _fixed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arguments = _arguments(_FIXED_TENSORS, ctx)
    of_rows, _, of_alpha, of_beta, of_zero_rows, of_weights = torch.ops.torchrec_mpe.fixed_embedding_bag_backward(
        grad, *arguments, ctx.needs_input_grad[15]
    )
    gradients: list[Tensor | None] = [None] * len(arguments)
    gradients[0], gradients[10], gradients[11] = of_rows, of_alpha, of_beta
    gradients[12] = None if arguments[12] is None else of_zero_rows
    gradients[15] = of_weights.to(arguments[15].dtype) if ctx.needs_input_grad[15] else None
    return tuple(gradients)


register("expected_embedding_bag", "reference", reference.expected_embedding_bag)
register("fixed_embedding_bag", "reference", reference.fixed_embedding_bag)
# Pooled by PyTorch's operations, rows quantized by the Triton kernels.
_of_triton = partial(expected_quantization, backend="triton"), partial(fixed_quantization, backend="triton")
register("expected_embedding_bag", "triton", partial(reference.expected_embedding_bag, quantize=_of_triton[0]))
register("fixed_embedding_bag", "triton", partial(reference.fixed_embedding_bag, quantize=_of_triton[1]))
for _backend in ("reference", "triton"):
    register("row_numbers", _backend, reference.row_numbers)
    register("unique_ids", _backend, reference.unique_ids)
if library.is_loaded():
    for _op in ("expected_embedding_bag", "fixed_embedding_bag", "row_numbers", "unique_ids"):
        register(_op, "cpu", partial(_compiled, _op))
    for _op, _kernel in triton_backend.CUDA_EMBEDDING_BAG.items():
        torch.library.impl(f"torchrec_mpe::{_op}", "CUDA", _kernel)
    torch.library.register_fake("torchrec_mpe::row_numbers", _fake_row_numbers)
    torch.library.register_fake("torchrec_mpe::unique_ids", _fake_unique_ids)
    torch.library.register_fake("torchrec_mpe::expected_embedding_bag", _fake_forward)
    torch.library.register_fake("torchrec_mpe::fixed_embedding_bag", _fake_forward)
    torch.library.register_fake("torchrec_mpe::expected_embedding_bag_backward", _fake_expected_backward)
    torch.library.register_fake("torchrec_mpe::fixed_embedding_bag_backward", _fake_fixed_backward)
    torch.library.register_autograd(
        "torchrec_mpe::expected_embedding_bag", _expected_backward, setup_context=partial(_save, _EXPECTED_TENSORS)
    )
    torch.library.register_autograd(
        "torchrec_mpe::fixed_embedding_bag", _fixed_backward, setup_context=partial(_save, _FIXED_TENSORS)
    )
