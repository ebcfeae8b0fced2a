"""Expected quantized rows: one kernel forward, one backward."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchrec_mpe.ops.triton.device import check_device
from torchrec_mpe.ops.triton.quantization_launch import BACKWARD_PROGRAMS, block_shape, check_dtypes, packed_widths
from torchrec_mpe.ops.triton.rounding import divide, round_to_code
from torchrec_mpe.ops.triton.segment_sum import segment_sum


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    rows,
    probabilities,
    group,
    alpha,
    beta,
    zero_rows,
    table,
    out,
    num_rows,
    dim,
    WIDTHS: tl.constexpr,  # noqa: N803
    CANDIDATES: tl.constexpr,  # noqa: N803
    ZERO_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_DIM: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    live = row < num_rows
    mask = live[:, None] & (column < dim)[None, :]
    position = row[:, None] * dim + column[None, :]
    offset = tl.load(beta + column, mask=column < dim, other=0.0)[None, :]
    centred = tl.load(rows + position, mask=mask, other=0.0) - offset
    row_group = tl.load(group + row, mask=live, other=0).to(tl.int64)
    expected = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=rows.dtype.element_ty)
    weight_of_beta = tl.zeros([BLOCK_ROWS], dtype=rows.dtype.element_ty)
    weight_of_zero = tl.zeros([BLOCK_ROWS], dtype=rows.dtype.element_ty)
    for k in tl.static_range(CANDIDATES):
        p = tl.load(probabilities + row_group * CANDIDATES + k, mask=live, other=0.0)
        if (WIDTHS >> (4 * k)) & 15 == 0:
            weight_of_zero += p
        else:
            step = tl.load(alpha + k)
            high = (1 << (((WIDTHS >> (4 * k)) & 15) - 1)) - 1.0
            code, _ = round_to_code(divide(centred, step), -high - 1, high)
            expected += code * (p * step)[:, None]
            weight_of_beta += p
    expected += weight_of_beta[:, None] * offset
    if ZERO_ROWS:
        row_table = tl.load(table + row, mask=live, other=0).to(tl.int64)
        zero = tl.load(zero_rows + row_table[:, None] * dim + column[None, :], mask=mask, other=0.0)
        expected += weight_of_zero[:, None] * zero
    tl.store(out + position, expected, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "programs"])
def _backward_kernel(
    grad,
    rows,
    probabilities,
    group,
    alpha,
    beta,
    zero_rows,
    table,
    gradient_scale,
    grad_rows,
    grad_row_probabilities,
    partial_alpha,
    partial_beta,
    num_rows,
    programs,
    dim,
    WIDTHS: tl.constexpr,  # noqa: N803
    CANDIDATES: tl.constexpr,  # noqa: N803
    CANDIDATES_BLOCK: tl.constexpr,  # noqa: N803
    ZERO_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_DIM: tl.constexpr,  # noqa: N803
):
    program = tl.program_id(0)
    candidate = tl.arange(0, CANDIDATES_BLOCK)
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
        g = tl.load(grad + position, mask=mask, other=0.0)
        centred = tl.load(rows + position, mask=mask, other=0.0) - offset
        row_group = tl.load(group + row, mask=live, other=0).to(tl.int64)
        of_rows = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=rows.dtype.element_ty)
        for k in tl.static_range(CANDIDATES):
            if (WIDTHS >> (4 * k)) & 15 == 0:
                of_p = tl.zeros([BLOCK_ROWS], dtype=rows.dtype.element_ty)
                if ZERO_ROWS:
                    row_table = tl.load(table + row, mask=live, other=0).to(tl.int64)
                    zero = tl.load(zero_rows + row_table[:, None] * dim + column[None, :], mask=mask, other=0.0)
                    of_p = tl.sum(g * zero, axis=1)
            else:
                p = tl.load(probabilities + row_group * CANDIDATES + k, mask=live, other=0.0)
                step = tl.load(alpha + k)
                high = (1 << (((WIDTHS >> (4 * k)) & 15) - 1)) - 1.0
                scaled = divide(centred, step)
                code, inside = round_to_code(scaled, -high - 1, high)
                of_p = tl.sum(g * (code * step + offset), axis=1)
                weighted = g * p[:, None]
                of_rows += tl.where(inside, weighted, 0.0)
                of_beta += tl.load(gradient_scale + k) * tl.where(inside, 0.0, weighted)
                of_step = tl.sum(weighted * tl.where(inside, code - scaled, code), axis=1)
                of_alpha += tl.where(candidate[None, :] == k, of_step[:, None], 0.0)
            tl.store(grad_row_probabilities + row * CANDIDATES + k, of_p, mask=live)
        tl.store(grad_rows + position, of_rows, mask=mask)
    partial = program.to(tl.int64)
    tl.store(partial_alpha + partial * CANDIDATES + candidate, tl.sum(of_alpha, axis=0), mask=candidate < CANDIDATES)
    tl.store(partial_beta + partial * dim + column, tl.sum(of_beta, axis=0), mask=column < dim)


def expected_quantization_forward(
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
    """The output of :func:`torchrec_mpe.ops.quantization.expected_quantization`, [N, D], without a gradient.

    Group and table numbers are not checked, which would wait for the device.

    Raises:
        TypeError: if rows are neither float32 nor float64, or another floating tensor has another dtype.
        ValueError: for CPU tensors outside Triton's interpreter.
    """
    check_device(rows)
    check_dtypes(
        rows, probabilities=probabilities, alpha=alpha, beta=beta, zero_rows=zero_rows, gradient_scale=gradient_scale
    )
    rows = rows.contiguous()
    out = torch.empty_like(rows)
    if rows.numel() == 0:
        return out
    has_zero_rows = zero_rows is not None and table is not None
    block_rows, block_dim = block_shape(rows.shape[1])
    _forward_kernel[(triton.cdiv(rows.shape[0], block_rows),)](
        rows,
        probabilities.contiguous(),
        group.contiguous(),
        alpha.contiguous(),
        beta.contiguous(),
        zero_rows.contiguous() if zero_rows is not None else rows,
        table.contiguous() if table is not None else group,
        out,
        rows.shape[0],
        rows.shape[1],
        WIDTHS=packed_widths(candidate_bits),
        CANDIDATES=len(candidate_bits),
        ZERO_ROWS=has_zero_rows,
        BLOCK_ROWS=block_rows,
        BLOCK_DIM=block_dim,
    )
    return out


def expected_quantization_backward(
    grad: Tensor,
    rows: Tensor,
    probabilities: Tensor,
    group: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: tuple[int, ...],
    gradient_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of rows, probabilities, alpha, beta and zero_rows, the same at every run.

    Args:
        grad (Tensor): [N, D], of the output.
        rows, probabilities, group, alpha, beta, zero_rows, table, candidate_bits, gradient_scale: the forward's.
    """
    check_device(rows)
    num_rows, dim = rows.shape
    rows, grad = rows.contiguous(), grad.contiguous()
    grad_rows = torch.empty_like(rows)
    candidates = len(candidate_bits)
    grad_row_probabilities = rows.new_empty((num_rows, candidates))
    has_zero_rows = zero_rows is not None and table is not None
    block_rows, block_dim = block_shape(dim)
    programs = min(triton.cdiv(num_rows, block_rows), BACKWARD_PROGRAMS)
    partial_alpha = rows.new_empty((programs, candidates))
    partial_beta = rows.new_empty((programs, dim))
    if programs:
        _backward_kernel[(programs,)](
            grad,
            rows,
            probabilities.contiguous(),
            group.contiguous(),
            alpha.contiguous(),
            beta.contiguous(),
            zero_rows.contiguous() if zero_rows is not None else rows,
            table.contiguous() if table is not None else group,
            gradient_scale.contiguous(),
            grad_rows,
            grad_row_probabilities,
            partial_alpha,
            partial_beta,
            num_rows,
            programs,
            dim,
            WIDTHS=packed_widths(candidate_bits),
            CANDIDATES=candidates,
            CANDIDATES_BLOCK=triton.next_power_of_2(candidates),
            ZERO_ROWS=has_zero_rows,
            BLOCK_ROWS=block_rows,
            BLOCK_DIM=block_dim,
        )
    grad_zero_rows = None
    if zero_rows is not None and table is not None:
        zero_columns = [k for k, bits in enumerate(candidate_bits) if bits == 0]
        weight_of_zero = probabilities[:, zero_columns].sum(1)[group.long()]
        grad_zero_rows = segment_sum(grad, weight_of_zero, table, zero_rows.shape[0])
    return (
        grad_rows,
        segment_sum(grad_row_probabilities, None, group, probabilities.shape[0]),
        partial_alpha.sum(0) * gradient_scale,
        partial_beta.sum(0),
        grad_zero_rows,
    )


class _ExpectedQuantization(torch.autograd.Function):
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
        ctx.save_for_backward(rows, probabilities, group, alpha, beta, zero_rows, table, gradient_scale)
        ctx.candidate_bits = candidate_bits
        return expected_quantization_forward(
            rows, probabilities, group, alpha, beta, zero_rows, table, candidate_bits, gradient_scale
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, probabilities, group, alpha, beta, zero_rows, table, gradient_scale = ctx.saved_tensors
        of_rows, of_probabilities, of_alpha, of_beta, of_zero_rows = expected_quantization_backward(
            grad, rows, probabilities, group, alpha, beta, zero_rows, table, ctx.candidate_bits, gradient_scale
        )
        return of_rows, of_probabilities, None, of_alpha, of_beta, of_zero_rows, None, None, None


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
        rows, probabilities, group, alpha, beta, zero_rows, table, candidate_bits, gradient_scale
    )
    return result
