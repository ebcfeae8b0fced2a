"""Rows quantized at fixed bit-widths: one kernel forward, one backward."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchrec_mpe.ops.triton.device import check_device
from torchrec_mpe.ops.triton.quantization_launch import BACKWARD_PROGRAMS, block_shape, check_dtypes
from torchrec_mpe.ops.triton.rounding import divide, round_to_code
from torchrec_mpe.ops.triton.segment_sum import segment_sum


@lru_cache(maxsize=64)
def _widths_on(candidate_bits: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(candidate_bits, dtype=torch.int32, device=device)


@triton.jit
def _row_scales(candidate, alpha, widths, row, live):
    """Per row: its candidate, step size (1 for 0 bits), bit-width and highest code, in the dtype of alpha."""
    own = tl.load(candidate + row, mask=live, other=0)
    bits = tl.load(widths + own, mask=live, other=0)
    step = tl.where(bits > 0, tl.load(alpha + own, mask=live, other=1.0), 1.0)
    half = (1 << tl.maximum(bits - 1, 0)).to(alpha.dtype.element_ty)
    return own, step, bits, half - 1


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    rows,
    candidate,
    alpha,
    beta,
    zero_rows,
    table,
    widths,
    out,
    num_rows,
    dim,
    ZERO_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_DIM: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    live = row < num_rows
    mask = live[:, None] & (column < dim)[None, :]
    position = row[:, None] * dim + column[None, :]
    _, step, bits, high = _row_scales(candidate, alpha, widths, row, live)
    offset = tl.load(beta + column, mask=column < dim, other=0.0)[None, :]
    x = tl.load(rows + position, mask=mask, other=0.0)
    scaled = divide(x - offset, tl.broadcast_to(step[:, None], [BLOCK_ROWS, BLOCK_DIM]))
    code, _ = round_to_code(scaled, -high[:, None] - 1, high[:, None])
    quantized = code * step[:, None] + offset
    zero = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=rows.dtype.element_ty)
    if ZERO_ROWS:
        row_table = tl.load(table + row, mask=live, other=0).to(tl.int64)
        is_read = mask & (bits == 0)[:, None]
        zero = tl.load(zero_rows + row_table[:, None] * dim + column[None, :], mask=is_read, other=0.0)
    tl.store(out + position, tl.where((bits == 0)[:, None], zero, quantized), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "programs"])
def _backward_kernel(
    grad,
    rows,
    candidate,
    alpha,
    beta,
    widths,
    gradient_scale,
    grad_rows,
    partial_alpha,
    partial_beta,
    num_rows,
    programs,
    dim,
    CANDIDATES: tl.constexpr,  # noqa: N803
    CANDIDATES_BLOCK: tl.constexpr,  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_DIM: tl.constexpr,  # noqa: N803
):
    program = tl.program_id(0)
    candidates = tl.arange(0, CANDIDATES_BLOCK)
    column = tl.arange(0, BLOCK_DIM)
    offset = tl.load(beta + column, mask=column < dim, other=0.0)[None, :]
    # Summed over this program's rows once, at the end.
    of_alpha = tl.zeros([BLOCK_ROWS, CANDIDATES_BLOCK], dtype=rows.dtype.element_ty)
    of_beta = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=rows.dtype.element_ty)
    for block in range(program, tl.cdiv(num_rows, BLOCK_ROWS), programs):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        live = row < num_rows
        mask = live[:, None] & (column < dim)[None, :]
        position = row[:, None] * dim + column[None, :]
        own, step, bits, high = _row_scales(candidate, alpha, widths, row, live)
        scale = tl.load(gradient_scale + own, mask=live, other=0.0)
        g = tl.load(grad + position, mask=mask, other=0.0)
        x = tl.load(rows + position, mask=mask, other=0.0)
        g = tl.where((bits == 0)[:, None], 0.0, g)
        scaled = divide(x - offset, tl.broadcast_to(step[:, None], [BLOCK_ROWS, BLOCK_DIM]))
        code, inside = round_to_code(scaled, -high[:, None] - 1, high[:, None])
        of_beta += scale[:, None] * tl.where(inside, 0.0, g)
        of_step = tl.sum(g * tl.where(inside, code - scaled, code), axis=1)
        of_alpha += tl.where(candidates[None, :] == own[:, None], of_step[:, None], 0.0)
        tl.store(grad_rows + position, tl.where(inside, g, 0.0), mask=mask)
    partial = program.to(tl.int64)
    tl.store(partial_alpha + partial * CANDIDATES + candidates, tl.sum(of_alpha, axis=0), mask=candidates < CANDIDATES)
    tl.store(partial_beta + partial * dim + column, tl.sum(of_beta, axis=0), mask=column < dim)


def fixed_quantization_forward(
    rows: Tensor,
    candidate: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: tuple[int, ...],
    gradient_scale: Tensor,
) -> Tensor:
    """The output of :func:`torchrec_mpe.ops.quantization.fixed_quantization`, [N, D], without a gradient.

    Candidate and table numbers are not checked, which would wait for the device.

    Raises:
        TypeError: if rows are neither float32 nor float64, or another floating tensor has another dtype.
        ValueError: for CPU tensors outside Triton's interpreter.
    """
    check_device(rows)
    check_dtypes(rows, alpha=alpha, beta=beta, zero_rows=zero_rows, gradient_scale=gradient_scale)
    rows = rows.contiguous()
    out = torch.empty_like(rows)
    if rows.numel() == 0:
        return out
    block_rows, block_dim = block_shape(rows.shape[1])
    _forward_kernel[(triton.cdiv(rows.shape[0], block_rows),)](
        rows,
        candidate.contiguous(),
        alpha.contiguous(),
        beta.contiguous(),
        zero_rows.contiguous() if zero_rows is not None else rows,
        table.contiguous() if table is not None else candidate,
        _widths_on(candidate_bits, rows.device),
        out,
        rows.shape[0],
        rows.shape[1],
        ZERO_ROWS=zero_rows is not None and table is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_DIM=block_dim,
    )
    return out


def fixed_quantization_backward(
    grad: Tensor,
    rows: Tensor,
    candidate: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: tuple[int, ...],
    gradient_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of rows, alpha, beta and zero_rows, the same at every run.

    Args:
        grad (Tensor): [N, D], of the output.
        rows, candidate, alpha, beta, zero_rows, table, candidate_bits, gradient_scale: the forward's.
    """
    check_device(rows)
    num_rows, dim = rows.shape
    rows, grad = rows.contiguous(), grad.contiguous()
    grad_rows = torch.empty_like(rows)
    candidates = len(candidate_bits)
    widths = _widths_on(candidate_bits, rows.device)
    block_rows, block_dim = block_shape(dim)
    programs = min(triton.cdiv(num_rows, block_rows), BACKWARD_PROGRAMS)
    partial_alpha = rows.new_empty((programs, candidates))
    partial_beta = rows.new_empty((programs, dim))
    if programs:
        _backward_kernel[(programs,)](
            grad,
            rows,
            candidate.contiguous(),
            alpha.contiguous(),
            beta.contiguous(),
            widths,
            gradient_scale.contiguous(),
            grad_rows,
            partial_alpha,
            partial_beta,
            num_rows,
            programs,
            dim,
            CANDIDATES=candidates,
            CANDIDATES_BLOCK=triton.next_power_of_2(candidates),
            BLOCK_ROWS=block_rows,
            BLOCK_DIM=block_dim,
        )
    grad_zero_rows = None
    if zero_rows is not None and table is not None:
        is_zero = (widths == 0).to(rows.dtype)[candidate.long()]
        grad_zero_rows = segment_sum(grad, is_zero, table, zero_rows.shape[0])
    return grad_rows, partial_alpha.sum(0) * gradient_scale, partial_beta.sum(0), grad_zero_rows


class _FixedQuantization(torch.autograd.Function):
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
        ctx.save_for_backward(rows, candidate, alpha, beta, zero_rows, table, gradient_scale)
        ctx.candidate_bits = candidate_bits
        return fixed_quantization_forward(
            rows, candidate, alpha, beta, zero_rows, table, candidate_bits, gradient_scale
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, candidate, alpha, beta, zero_rows, table, gradient_scale = ctx.saved_tensors
        of_rows, of_alpha, of_beta, of_zero_rows = fixed_quantization_backward(
            grad, rows, candidate, alpha, beta, zero_rows, table, ctx.candidate_bits, gradient_scale
        )
        return of_rows, None, of_alpha, of_beta, of_zero_rows, None, None, None


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
        rows, candidate, alpha, beta, zero_rows, table, candidate_bits, gradient_scale
    )
    return result
