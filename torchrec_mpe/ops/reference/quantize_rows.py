"""Rows quantized as in training, in pure PyTorch: the definition that every backend is tested against.

In search the expectation over the bit-widths: ``out[n] = sum_k p[line[n], k] * Q_k(rows[n])`` with ``Q_k(x) =
clamp(round((x - beta) / alpha[k]), -2**(b-1), 2**(b-1) - 1) * alpha[k] + beta`` for ``b = candidate_bits[k] > 0``, and
``Q_k(x) = zero_rows[table[n]]`` (or zero) for ``b = 0``. In retraining ``out[n] = Q_line[n](rows[n])``. Source: MPE
(arXiv 2409.20305), equations of section 3.3; LSQ+ (arXiv 2004.09576).

Gradients are the straight-through estimator's: rounding has gradient 1; outside the code range a row gets none and beta
gets it all; alpha gets ``round(v) - v`` inside and the bound outside. The gradients of ``alpha[k]``, and what candidate
k adds to beta's, are multiplied by ``gradient_scale[k]``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_mpe.ops.bags import Gradients


class RowsToQuantize(NamedTuple):
    """Rows and what quantizes them.

    Attributes:
        rows (Tensor): [N, D], float32 or float64.
        line (Tensor): integer [N], each row's feature group in search, in retraining the index of its bit-width.
        probabilities (Optional[Tensor]): [G, m], a row per feature group; None in retraining.
        alpha (Tensor): [m] positive step sizes; the entry of bit-width 0 is not read.
        beta (Tensor): [D] offset.
        zero_rows (Optional[Tensor]): [T, D], what a 0-bit row of each table reads; None reads zero.
        table (Tensor): integer [N], each row's line of ``zero_rows``.
        candidate_bits (Sequence[int]): m different bit-widths, each 0 to 8.
        gradient_scale (Tensor): [m].
    """

    rows: Tensor
    line: Tensor
    probabilities: Tensor | None
    alpha: Tensor
    beta: Tensor
    zero_rows: Tensor | None
    table: Tensor
    candidate_bits: Sequence[int]
    gradient_scale: Tensor


def code_range(bits: int) -> tuple[int, int]:
    """The smallest and largest signed code of a bit-width, ``-2**(b-1)`` and ``2**(b-1) - 1``."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def quantize_rows(x: RowsToQuantize) -> Tensor:
    """The quantized rows, [N, D]."""
    return _fixed(x) if x.probabilities is None else _expected(x, x.probabilities)


def quantize_rows_backward(grad: Tensor, x: RowsToQuantize) -> Gradients:
    """The gradients, given that of the quantized rows, [N, D]."""
    return _fixed_backward(grad, x) if x.probabilities is None else _expected_backward(grad, x, x.probabilities)


# Search: one candidate at a time, so that memory stays at a few [N, D] tensors.


def _expected(x: RowsToQuantize, probabilities: Tensor) -> Tensor:
    row_probabilities = probabilities[x.line.long()]
    centred = x.rows - x.beta
    expected = torch.zeros_like(x.rows)
    weight_of_beta = torch.zeros_like(row_probabilities[:, :1])
    for k, bits in enumerate(x.candidate_bits):
        p = row_probabilities[:, k : k + 1]
        if bits == 0:
            if x.zero_rows is not None:
                expected.addcmul_(p, x.zero_rows[x.table])
            continue
        low, high = code_range(bits)
        expected.addcmul_((centred / x.alpha[k]).round_().clamp_(low, high), p * x.alpha[k])
        weight_of_beta += p
    return expected.addcmul_(weight_of_beta, x.beta)


def _expected_backward(grad: Tensor, x: RowsToQuantize, probabilities: Tensor) -> Gradients:
    line = x.line.long()
    row_probabilities = probabilities[line]
    centred = x.rows - x.beta
    grad_rows = torch.zeros_like(x.rows)
    grad_row_probabilities = torch.zeros_like(row_probabilities)
    grad_alpha = torch.zeros_like(x.alpha)
    grad_beta = torch.zeros_like(x.beta)
    grad_zero_rows = None if x.zero_rows is None else torch.zeros_like(x.zero_rows)
    for k, bits in enumerate(x.candidate_bits):
        p = row_probabilities[:, k : k + 1]
        if bits == 0:
            if x.zero_rows is not None and grad_zero_rows is not None:
                grad_row_probabilities[:, k] = (grad * x.zero_rows[x.table]).sum(1)
                grad_zero_rows.index_add_(0, x.table, grad * p)
            continue
        low, high = code_range(bits)
        scaled = centred / x.alpha[k]
        rounded = scaled.round()
        code = rounded.clamp(low, high)
        inside = rounded == code
        weighted = grad * p
        inner = torch.where(inside, weighted, 0)
        grad_rows += inner
        # Outside the range the quantizer is the bound times alpha, plus beta; inside, beta cancels.
        grad_beta += x.gradient_scale[k] * (weighted - inner).sum(0)
        grad_alpha[k] = x.gradient_scale[k] * ((code * weighted).sum() - (scaled * inner).sum())
        grad_row_probabilities[:, k] = x.alpha[k] * (grad * code).sum(1) + grad @ x.beta
    grad_probabilities = torch.zeros_like(probabilities).index_add_(0, line, grad_row_probabilities)
    return Gradients(grad_rows, grad_probabilities, grad_alpha, grad_beta, grad_zero_rows)


# Retraining: one pass for all bit-widths, step size and code range are gathered per row.


class _Codes(NamedTuple):
    is_zero: Tensor  # [N, 1], whether a row has 0 bits
    step: Tensor  # [N, 1], 1 for 0 bits
    scaled: Tensor  # [N, D]
    code: Tensor  # [N, D], in the range
    inside: Tensor  # [N, D], whether rounding ended there; False for 0 bits


def _codes(x: RowsToQuantize) -> _Codes:
    line = x.line.long()
    ranges = [code_range(bits) if bits else (0, 0) for bits in x.candidate_bits]
    bounds = torch.tensor(ranges, dtype=x.rows.dtype, device=x.rows.device)[line]
    is_zero = torch.tensor([bits == 0 for bits in x.candidate_bits], device=x.rows.device)[line].unsqueeze(1)
    step = torch.where(is_zero, 1, x.alpha[line].unsqueeze(1))
    scaled = (x.rows - x.beta) / step
    rounded = scaled.round()
    code = torch.minimum(torch.maximum(rounded, bounds[:, :1]), bounds[:, 1:])
    return _Codes(is_zero, step, scaled, code, (rounded == code) & ~is_zero)


def _fixed(x: RowsToQuantize) -> Tensor:
    codes = _codes(x)
    zero = torch.zeros_like(x.beta) if x.zero_rows is None else x.zero_rows[x.table]
    return torch.where(codes.is_zero, zero, torch.addcmul(x.beta, codes.code, codes.step))


def _fixed_backward(grad: Tensor, x: RowsToQuantize) -> Gradients:
    is_zero, _, scaled, code, inside = _codes(x)
    line = x.line.long()
    row_scale = torch.where(is_zero, 0, x.gradient_scale[line].unsqueeze(1))
    per_row_alpha = (grad * torch.where(inside, code - scaled, code)).sum(1)
    grad_alpha = torch.zeros_like(x.alpha).index_add_(0, line, row_scale.squeeze(1) * per_row_alpha)
    grad_beta = (torch.where(inside, 0, grad) * row_scale).sum(0)
    grad_zero_rows = None
    if x.zero_rows is not None:
        grad_zero_rows = torch.zeros_like(x.zero_rows).index_add_(0, x.table, torch.where(is_zero, grad, 0))
    return Gradients(torch.where(inside, grad, 0), None, grad_alpha, grad_beta, grad_zero_rows)
