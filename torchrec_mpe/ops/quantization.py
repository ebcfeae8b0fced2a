"""The LSQ+ fake-quantization ops of search and retraining."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.ops import library, triton_backend
from torchrec_mpe.ops.backends import implementation, register
from torchrec_mpe.ops.reference import expected_quantization as reference_of_expected
from torchrec_mpe.ops.reference import fixed_quantization as reference_of_fixed


def expected_quantization(
    rows: Tensor,
    probabilities: Tensor,
    group: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Expectation of the quantized rows over their groups' bit-width probabilities.

    ``out[n] = sum_k p[group[n], k] * Q_k(rows[n])`` with ``Q_k(x) = clamp(round((x - beta) / alpha[k]), -2**(b-1),
    2**(b-1) - 1) * alpha[k] + beta`` for ``b = candidate_bits[k] > 0``, and ``Q_k(x) = zero_rows[table[n]]`` (or zero)
    for ``b = 0``. Source: MPE (arXiv 2409.20305), equations of section 3.3; LSQ+ (arXiv 2004.09576).

    Gradients are the straight-through estimator's: rounding has gradient 1; outside the code range a row gets none
    and beta gets it all; alpha gets ``round(v) - v`` inside and the bound outside. The gradients of ``alpha[k]``, and
    what candidate k adds to beta's, are multiplied by ``gradient_scale[k]``.

    Args:
        rows (Tensor): [N, D], float32 or float64.
        probabilities (Tensor): [G, m], a row per feature group.
        group (Tensor): integer [N], the feature group of each row.
        alpha (Tensor): [m] positive step sizes; the entry of bit-width 0 is not read.
        beta (Tensor): [D] offset.
        zero_rows (Optional[Tensor]): [T, D], what a 0-bit row of each table reads; None reads zero.
        table (Optional[Tensor]): integer [N], each row's line of ``zero_rows``; needed with ``zero_rows``.
        candidate_bits (Sequence[int]): m different bit-widths, each 0 to 8.
        gradient_scale (Tensor): [m].
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Returns:
        Tensor: [N, D], dtype of ``rows``.

    Raises:
        IndexError: if a group or table number is out of range.
        TypeError: if the floating point tensors differ in dtype.
        ValueError: if shapes do not fit, or a candidate bit-width is repeated or not in 0 to 8.
    """
    run = implementation("expected_quantization", backend)
    result: Tensor = run(
        rows, probabilities, group, alpha, beta, zero_rows, table, check_candidates(candidate_bits), gradient_scale
    )
    return result


def fixed_quantization(
    rows: Tensor,
    candidate: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Every row quantized at its own bit-width: :func:`expected_quantization` with one-hot probabilities.

    Args:
        rows (Tensor): [N, D], float32 or float64.
        candidate (Tensor): integer [N], the index into ``candidate_bits`` of each row's bit-width.
        alpha, beta, zero_rows, table, candidate_bits, gradient_scale, backend: as in :func:`expected_quantization`.

    Returns:
        Tensor: [N, D], dtype of ``rows``.

    Raises:
        IndexError, TypeError, ValueError: as :func:`expected_quantization`.
    """
    run = implementation("fixed_quantization", backend)
    bits = check_candidates(candidate_bits)
    result: Tensor = run(rows, candidate, alpha, beta, zero_rows, table, bits, gradient_scale)
    return result


def check_candidates(candidate_bits: Sequence[int]) -> tuple[int, ...]:
    """The candidate bit-widths, if they are what every backend takes.

    Raises:
        ValueError: if there are none, or one is repeated or not in 0 to 8.
    """
    bits = tuple(candidate_bits)
    if not bits:
        raise ValueError("no candidate bit-widths")
    for b in bits:
        if not 0 <= b <= 8:
            raise ValueError(f"candidate bit-width {b} is not in 0 to 8")
        if bits.count(b) > 1:
            raise ValueError(f"candidate bit-widths {list(bits)} repeat {b}")
    return bits


def _compiled(op: str, *arguments: Any) -> Tensor:
    """The op of the library: C++ on CPU tensors, Triton on CUDA tensors, shapes only on meta tensors."""
    result: Tensor = getattr(torch.ops.torchrec_mpe, op)(*arguments)
    return result


def _fake_forward(rows: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def fake_gradients(
    rows: Tensor,
    probabilities: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The shapes of a backward op's six results, of rows or of bags; empty for what the forward op has not."""
    return (
        torch.empty_like(rows, memory_format=torch.contiguous_format),
        rows.new_empty((0,) if probabilities is None else probabilities.shape),
        rows.new_empty(alpha.shape),
        rows.new_empty(beta.shape),
        rows.new_empty((0,) if zero_rows is None else zero_rows.shape),
        rows.new_empty((0,) if weights is None else weights.shape),
    )


def _fake_expected_backward(
    grad: Tensor,
    rows: Tensor,
    probabilities: Tensor,
    group: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
) -> tuple[Tensor, ...]:
    return fake_gradients(rows, probabilities, alpha, beta, zero_rows)


def _fake_fixed_backward(
    grad: Tensor,
    rows: Tensor,
    candidate: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
) -> tuple[Tensor, ...]:
    return fake_gradients(rows, None, alpha, beta, zero_rows)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.candidate_bits, gradient_scale = inputs
    ctx.save_for_backward(*tensors, gradient_scale)


def _expected_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, gradient_scale = ctx.saved_tensors
    of_rows, of_probabilities, of_alpha, of_beta, of_zero_rows, _ = (
        torch.ops.torchrec_mpe.expected_quantization_backward(grad, *tensors, ctx.candidate_bits, gradient_scale)
    )
    zero_rows = tensors[5]
    if zero_rows is None:
        of_zero_rows = None
    return of_rows, of_probabilities, None, of_alpha, of_beta, of_zero_rows, None, None, None


def _fixed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, gradient_scale = ctx.saved_tensors
    of_rows, _, of_alpha, of_beta, of_zero_rows, _ = torch.ops.torchrec_mpe.fixed_quantization_backward(
        grad, *tensors, ctx.candidate_bits, gradient_scale
    )
    zero_rows = tensors[4]
    if zero_rows is None:
        of_zero_rows = None
    return of_rows, None, of_alpha, of_beta, of_zero_rows, None, None, None


register("expected_quantization", "reference", reference_of_expected.expected_quantization)
register("fixed_quantization", "reference", reference_of_fixed.fixed_quantization)
if library.is_loaded():
    register("expected_quantization", "cpu", partial(_compiled, "expected_quantization"))
    register("fixed_quantization", "cpu", partial(_compiled, "fixed_quantization"))
    torch.library.register_fake("torchrec_mpe::expected_quantization", _fake_forward)
    torch.library.register_fake("torchrec_mpe::fixed_quantization", _fake_forward)
    torch.library.register_fake("torchrec_mpe::expected_quantization_backward", _fake_expected_backward)
    torch.library.register_fake("torchrec_mpe::fixed_quantization_backward", _fake_fixed_backward)
    for _op, _kernel in triton_backend.CUDA_QUANTIZATION.items():
        torch.library.impl(f"torchrec_mpe::{_op}", "CUDA", _kernel)
    torch.library.register_autograd("torchrec_mpe::expected_quantization", _expected_backward, setup_context=_save)
    torch.library.register_autograd("torchrec_mpe::fixed_quantization", _fixed_backward, setup_context=_save)
