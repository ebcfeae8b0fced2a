"""Expected quantized rows in pure PyTorch: the definition that every backend is tested against."""

from typing import Any

import torch
from torch import Tensor


def code_range(bits: int) -> tuple[int, int]:
    """The smallest and largest signed code of a bit-width, ``-2**(b-1)`` and ``2**(b-1) - 1``."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


class _ExpectedQuantization(torch.autograd.Function):
    """Forward and straight-through backward, one candidate at a time so that memory stays at a few [N, D] tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        probabilities: Tensor,
        group: Tensor,
        alpha: Tensor,
        beta: Tensor,
        zero_rows: Tensor | None,
        table: Tensor | None,
        candidate_bits: tuple[int, ...],
        gradient_scale: Tensor,
    ) -> Tensor:
        row_probabilities = probabilities[group]
        centred = rows - beta
        expected = torch.zeros_like(rows)
        weight_of_beta = torch.zeros_like(row_probabilities[:, :1])
        for k, bits in enumerate(candidate_bits):
            p = row_probabilities[:, k : k + 1]
            if bits == 0:
                if zero_rows is not None and table is not None:
                    expected.addcmul_(p, zero_rows[table])
                continue
            low, high = code_range(bits)
            expected.addcmul_((centred / alpha[k]).round_().clamp_(low, high), p * alpha[k])
            weight_of_beta += p
        expected.addcmul_(weight_of_beta, beta)
        ctx.save_for_backward(rows, probabilities, group, alpha, beta, zero_rows, table, gradient_scale)
        ctx.candidate_bits = candidate_bits
        return expected

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, probabilities, group, alpha, beta, zero_rows, table, gradient_scale = ctx.saved_tensors
        row_probabilities = probabilities[group]
        centred = rows - beta
        grad_rows = torch.zeros_like(rows)
        grad_row_probabilities = torch.zeros_like(row_probabilities)
        grad_alpha = torch.zeros_like(alpha)
        grad_beta = torch.zeros_like(beta)
        grad_zero_rows = None if zero_rows is None else torch.zeros_like(zero_rows)
        for k, bits in enumerate(ctx.candidate_bits):
            p = row_probabilities[:, k : k + 1]
            if bits == 0:
                if grad_zero_rows is not None:
                    grad_row_probabilities[:, k] = (grad * zero_rows[table]).sum(1)
                    grad_zero_rows.index_add_(0, table, grad * p)
                continue
            low, high = code_range(bits)
            scaled = centred / alpha[k]
            rounded = scaled.round()
            code = rounded.clamp(low, high)
            inside = rounded == code
            weighted = grad * p
            inner = torch.where(inside, weighted, 0)
            grad_rows += inner
            # Outside the range the quantizer is the bound times alpha, plus beta; inside, beta cancels.
            grad_beta += gradient_scale[k] * (weighted - inner).sum(0)
            grad_alpha[k] = gradient_scale[k] * ((code * weighted).sum() - (scaled * inner).sum())
            grad_row_probabilities[:, k] = alpha[k] * (grad * code).sum(1) + grad @ beta
        grad_probabilities = torch.zeros_like(probabilities).index_add_(0, group, grad_row_probabilities)
        return grad_rows, grad_probabilities, None, grad_alpha, grad_beta, grad_zero_rows, None, None, None


def expected_quantization(
    rows: Tensor,
    probabilities: Tensor,
    group: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: tuple[int, ...],
    gradient_scale: Tensor,
) -> Tensor:
    """See :func:`torchrec_mpe.ops.quantization.expected_quantization`."""
    result: Tensor = _ExpectedQuantization.apply(  # type: ignore[no-untyped-call]
        rows, probabilities, group.long(), alpha, beta, zero_rows, table, candidate_bits, gradient_scale
    )
    return result
