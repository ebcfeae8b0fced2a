"""Quantize and pool in one op: looked-up rows in, pooled embeddings of quantized rows out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.ops import library, triton_backend
from torchrec_mpe.ops.backends import implementation, register
from torchrec_mpe.ops.bags import ARGUMENT_NAMES, Arguments, Bags, Gradients
from torchrec_mpe.ops.reference import quantized_embedding_bag as reference


def quantized_embedding_bag(
    rows: Tensor,
    bags: Bags,
    row_map: Tensor,
    probabilities: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
    *,
    gradient_factor: float = 1,
    backend: str | None = None,
) -> Tensor:
    """Pool bags over rows that are quantized as in training.

    With ``probabilities`` (search) a row is the expectation of its quantized values over its feature group's
    bit-widths, without (retraining) it has one bit-width. How a row is quantized, and its gradients, are defined in
    :mod:`torchrec_mpe.ops.reference.quantize_rows`.

    With the ``index`` and ``row_offsets`` of :func:`unique_ids` in ``bags``, ``rows`` and the bags' ids are those of
    each feature's distinct ids, U in all, which are quantized once: the same result, in less time where ids repeat.

    Args:
        rows (Tensor): [N, D], or [U, D], float32 or float64, the rows of all ids.
        bags (Bags): of F features.
        row_map (Tensor): integer [rows of all tables], each row's feature group, or the index into ``candidate_bits``
            of its bit-width; row n, of feature f, reads ``row_map[bags.first_row[f] + bags.ids[n]]``.
        probabilities (Optional[Tensor]): [G, m], a row per feature group.
        alpha (Tensor): [m] positive step sizes; the entry of bit-width 0 is not read.
        beta (Tensor): [D] offset.
        zero_rows (Optional[Tensor]): [T, D], what a 0-bit row of each table reads; None reads zero.
        candidate_bits (Sequence[int]): m different bit-widths, each 0 to 8.
        gradient_scale (Tensor): [m], multiplies the gradients of ``alpha`` and what each candidate adds to beta's.
        gradient_factor (float): multiplies the gradients of probabilities, alpha, beta and zero_rows.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Returns:
        Tensor: [bags, D], or [B, F * D] if ``bags.side_by_side``, dtype of ``rows``.

    Raises:
        IndexError: if a group, a table number or a feature's rows are out of range.
        TypeError: if the floating point tensors but the weights differ in dtype.
        ValueError: if shapes do not fit, a feature has a negative number of bags, offsets decrease or do not span the
            ids, or a candidate bit-width is repeated or not in 0 to 8.
    """
    _check_bags(bags.bags_per_feature)
    run = implementation("quantized_embedding_bag", backend)
    bits = _check_candidates(candidate_bits)
    result: Tensor = run(
        rows, *bags, row_map, probabilities, alpha, beta, zero_rows, bits, gradient_scale, gradient_factor
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
        ids, offsets, bags_per_feature, first_row, num_rows: as in :class:`torchrec_mpe.ops.bags.Bags`.
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
        ids, offsets, bags_per_feature, num_rows: as in :class:`torchrec_mpe.ops.bags.Bags`; an id outside counts as 0.
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


def _check_candidates(candidate_bits: Sequence[int]) -> tuple[int, ...]:
    bits = tuple(candidate_bits)
    if not bits:
        raise ValueError("no candidate bit-widths")
    for b in bits:
        if not 0 <= b <= 8:
            raise ValueError(f"candidate bit-width {b} is not in 0 to 8")
        if bits.count(b) > 1:
            raise ValueError(f"candidate bit-widths {list(bits)} repeat {b}")
    return bits


def _compiled(op: str, *arguments: Any) -> Any:
    """The op of the library: C++ on CPU tensors, PyTorch and Triton on CUDA tensors, shapes only on meta tensors."""
    return getattr(torch.ops.torchrec_mpe, op)(*arguments)


def _fake(rows: Tensor, *arguments: Any) -> Tensor:
    return rows.new_empty(reference.pooled_shape(rows, Arguments.of(rows, *arguments).bags))


def _fake_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *flat, weights_require_grad = arguments
    named = dict(zip(ARGUMENT_NAMES, flat, strict=True))
    if not weights_require_grad:
        named["per_sample_weights"] = None
    return tuple(grad.new_empty((0,) if named[of] is None else named[of].shape) for of in Gradients._fields)


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]


def _gradients(run: Callable[..., Sequence[Tensor | None]], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments, from those that a backend's backward returns by name."""
    saved = zip(ctx.saved_tensors, ctx.others, strict=True)
    arguments = [other if tensor is None else tensor for tensor, other in saved]
    needed = dict(zip(ARGUMENT_NAMES, ctx.needs_input_grad, strict=True))
    of_arguments = run(grad, *arguments, needed["per_sample_weights"])
    gradients: dict[str, Any] = dict(zip(Gradients._fields, of_arguments, strict=True))
    return tuple(
        gradients[name].to(value.dtype) if needed[name] and name in gradients else None
        for name, value in zip(ARGUMENT_NAMES, arguments, strict=True)
    )


def _reference(*arguments: Any) -> Tensor:
    return reference.quantized_embedding_bag(Arguments.of(*arguments))


def _reference_backward(grad: Tensor, *arguments: Any) -> Gradients:
    *flat, weights_require_grad = arguments
    return reference.quantized_embedding_bag_backward(grad, Arguments.of(*flat), weights_require_grad)


def _differentiable(
    forward: Callable[..., Tensor], backward: Callable[..., Sequence[Tensor | None]]
) -> Callable[..., Tensor]:
    """An implementation that is no operator of the library, with the gradients that the operator has."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Tensor:
            return forward(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            _save(ctx, inputs, output)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return _gradients(backward, ctx, grad)

    return Differentiable.apply


register("quantized_embedding_bag", "reference", _differentiable(_reference, _reference_backward))
_triton = triton_backend.quantized_embedding_bag, triton_backend.quantized_embedding_bag_backward
register("quantized_embedding_bag", "triton", _differentiable(*_triton))
for _backend in ("reference", "triton"):
    register("row_numbers", _backend, reference.row_numbers)
    register("unique_ids", _backend, reference.unique_ids)
if library.is_loaded():
    for _op in ("quantized_embedding_bag", "row_numbers", "unique_ids"):
        register(_op, "cpu", partial(_compiled, _op))
    for _op, _kernel in triton_backend.CUDA_EMBEDDING_BAG.items():
        torch.library.impl(f"torchrec_mpe::{_op}", "CUDA", _kernel)
    torch.library.register_fake("torchrec_mpe::row_numbers", _fake_row_numbers)
    torch.library.register_fake("torchrec_mpe::unique_ids", _fake_unique_ids)
    torch.library.register_fake("torchrec_mpe::quantized_embedding_bag", _fake)
    torch.library.register_fake("torchrec_mpe::quantized_embedding_bag_backward", _fake_backward)
    torch.library.register_autograd(
        "torchrec_mpe::quantized_embedding_bag",
        partial(_gradients, partial(_compiled, "quantized_embedding_bag_backward")),
        setup_context=_save,
    )
