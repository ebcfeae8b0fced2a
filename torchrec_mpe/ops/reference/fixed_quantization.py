"""Rows quantized at fixed bit-widths in pure PyTorch: the definition that every backend is tested against."""

from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.ops.reference.expected_quantization import code_range


class _FixedQuantization(torch.autograd.Function):
    """One pass for all bit-widths: step size and code range are gathered per row."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        candidate: Tensor,
        alpha: Tensor,
        beta: Tensor,
        zero_rows: Tensor | None,
        table: Tensor | None,
        candidate_bits: tuple[int, ...],
        gradient_scale: Tensor,
    ) -> Tensor:
        ranges = [code_range(bits) if bits else (0, 0) for bits in candidate_bits]
        bounds = torch.tensor(ranges, dtype=rows.dtype, device=rows.device)[candidate]
        low, high = bounds[:, :1], bounds[:, 1:]
        is_zero = torch.tensor([bits == 0 for bits in candidate_bits], device=rows.device)[candidate].unsqueeze(1)
        step = torch.where(is_zero, 1, alpha[candidate].unsqueeze(1))
        scaled = (rows - beta) / step
        rounded = scaled.round()
        code = torch.minimum(torch.maximum(rounded, low), high)
        quantized = torch.addcmul(beta, code, step)
        zero = zero_rows[table] if zero_rows is not None and table is not None else torch.zeros_like(beta)
        quantized = torch.where(is_zero, zero, quantized)
        inside = (rounded == code) & ~is_zero
        ctx.save_for_backward(scaled, code, inside, is_zero, candidate, alpha, zero_rows, table, gradient_scale)
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled, code, inside, is_zero, candidate, alpha, zero_rows, table, gradient_scale = ctx.saved_tensors
        grad_rows = torch.where(inside, grad, 0)
        row_scale = torch.where(is_zero, 0, gradient_scale[candidate].unsqueeze(1))
        per_row_alpha = (grad * torch.where(inside, code - scaled, code)).sum(1)
        grad_alpha = torch.zeros_like(alpha).index_add_(0, candidate, row_scale.squeeze(1) * per_row_alpha)
        grad_beta = (torch.where(inside, 0, grad) * row_scale).sum(0)
        grad_zero_rows = None
        if zero_rows is not None:
            grad_zero_rows = torch.zeros_like(zero_rows).index_add_(0, table, torch.where(is_zero, grad, 0))
        return grad_rows, None, grad_alpha, grad_beta, grad_zero_rows, None, None, None


def fixed_quantization(
    rows: Tensor,
    candidate: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: tuple[int, ...],
    gradient_scale: Tensor,
) -> Tensor:
    """See :func:`torchrec_mpe.ops.quantization.fixed_quantization`."""
    result: Tensor = _FixedQuantization.apply(  # type: ignore[no-untyped-call]
        rows, candidate.long(), alpha, beta, zero_rows, table, candidate_bits, gradient_scale
    )
    return result
