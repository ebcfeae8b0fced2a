"""Rows quantized as in training: one kernel forward, one backward, each compiled for search and for retraining."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
import torch
import triton
import triton.language as tl
from torch import Tensor

from torchrec_mpe.ops.bags import Gradients
from torchrec_mpe.ops.reference.quantize_rows import RowsToQuantize
from torchrec_mpe.ops.triton.device import check_device
from torchrec_mpe.ops.triton.rounding import divide, round_to_code
from torchrec_mpe.ops.triton.segment_sum import segment_sum

_BACKWARD_PROGRAMS = 1024  # at most; each leaves one line of partial sums
_BLOCK_ELEMENTS = 1024


@triton.jit
def _zero_rows_of(zero_rows, table, row, column, dim, live, mask):
    row_table = tl.load(table + row, mask=live, other=0).to(tl.int64)
    return tl.load(zero_rows + row_table[:, None] * dim + column[None, :], mask=mask, other=0.0)


@triton.jit
def _own_scales(own, alpha, live, WIDTHS: tl.constexpr):  # noqa: N803
    """Per row: step size (1 for 0 bits), bit-width and highest code, in the dtype of alpha, [rows, 1]."""
    bits = ((WIDTHS >> (4 * own)) & 15)[:, None]
    step = tl.where(bits > 0, tl.load(alpha + own, mask=live, other=1.0)[:, None], 1.0)
    half = (1 << tl.maximum(bits - 1, 0)).to(alpha.dtype.element_ty)
    return step, bits, half - 1


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    rows,
    line,
    probabilities,
    alpha,
    beta,
    zero_rows,
    table,
    out,
    num_rows,
    dim,
    SEARCH: tl.constexpr,  # noqa: N803
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
    own = tl.load(line + row, mask=live, other=0).to(tl.int64)
    quantized = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=rows.dtype.element_ty)
    if SEARCH:
        weight_of_beta = tl.zeros([BLOCK_ROWS], dtype=rows.dtype.element_ty)
        weight_of_zero = tl.zeros([BLOCK_ROWS], dtype=rows.dtype.element_ty)
        for k in tl.static_range(CANDIDATES):
            p = tl.load(probabilities + own * CANDIDATES + k, mask=live, other=0.0)
            if (WIDTHS >> (4 * k)) & 15 == 0:
                weight_of_zero += p
            else:
                step = tl.load(alpha + k)
                high = (1 << (((WIDTHS >> (4 * k)) & 15) - 1)) - 1.0
                code, _ = round_to_code(divide(centred, step), -high - 1, high)
                quantized += code * (p * step)[:, None]
                weight_of_beta += p
        quantized += weight_of_beta[:, None] * offset
        if ZERO_ROWS:
            quantized += weight_of_zero[:, None] * _zero_rows_of(zero_rows, table, row, column, dim, live, mask)
    else:
        step, bits, high = _own_scales(own, alpha, live, WIDTHS)
        code, _ = round_to_code(divide(centred, tl.broadcast_to(step, [BLOCK_ROWS, BLOCK_DIM])), -high - 1, high)
        zero = quantized
        if ZERO_ROWS:
            zero = _zero_rows_of(zero_rows, table, row, column, dim, live, mask & (bits == 0))
        quantized = tl.where(bits == 0, zero, code * step + offset)
    tl.store(out + position, quantized, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "programs"])
def _backward_kernel(
    grad,
    rows,
    line,
    probabilities,
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
    SEARCH: tl.constexpr,  # noqa: N803
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
        own = tl.load(line + row, mask=live, other=0).to(tl.int64)
        of_rows = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=rows.dtype.element_ty)
        if SEARCH:
            for k in tl.static_range(CANDIDATES):
                if (WIDTHS >> (4 * k)) & 15 == 0:
                    of_p = tl.zeros([BLOCK_ROWS], dtype=rows.dtype.element_ty)
                    if ZERO_ROWS:
                        of_p = tl.sum(g * _zero_rows_of(zero_rows, table, row, column, dim, live, mask), axis=1)
                else:
                    p = tl.load(probabilities + own * CANDIDATES + k, mask=live, other=0.0)
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
        else:
            step, bits, high = _own_scales(own, alpha, live, WIDTHS)
            scale = tl.load(gradient_scale + own, mask=live, other=0.0)
            g = tl.where(bits == 0, 0.0, g)
            scaled = divide(centred, tl.broadcast_to(step, [BLOCK_ROWS, BLOCK_DIM]))
            code, inside = round_to_code(scaled, -high - 1, high)
            of_beta += scale[:, None] * tl.where(inside, 0.0, g)
            of_step = tl.sum(g * tl.where(inside, code - scaled, code), axis=1)
            of_alpha += tl.where(candidate[None, :] == own[:, None], of_step[:, None], 0.0)
            of_rows = tl.where(inside, g, 0.0)
        tl.store(grad_rows + position, of_rows, mask=mask)
    partial = program.to(tl.int64)
    tl.store(partial_alpha + partial * CANDIDATES + candidate, tl.sum(of_alpha, axis=0), mask=candidate < CANDIDATES)
    tl.store(partial_beta + partial * dim + column, tl.sum(of_beta, axis=0), mask=column < dim)


def block_shape(dim: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, powers of two; a row is never cut."""
    columns = triton.next_power_of_2(dim)
    return max(1, _BLOCK_ELEMENTS // columns), columns


def quantize_rows(x: RowsToQuantize) -> Tensor:
    """The quantized rows, [N, D].

    Lines and table numbers are not checked, which would wait for the device.

    Raises:
        TypeError: if rows are neither float32 nor float64, or another floating tensor has another dtype.
        ValueError: for CPU tensors outside Triton's interpreter.
    """
    check_device(x.rows)
    _check_dtypes(x)
    num_rows, dim = x.rows.shape
    out = torch.empty_like(x.rows, memory_format=torch.contiguous_format)
    if out.numel():
        grid = (triton.cdiv(num_rows, block_shape(dim)[0]),)
        _forward_kernel[grid](*_pointers(x), out, num_rows, dim, **_constants(x))
    return out


def quantize_rows_backward(grad: Tensor, x: RowsToQuantize) -> Gradients:
    """The gradients, given that of the quantized rows, [N, D]; the same at every run."""
    check_device(x.rows)
    num_rows, dim = x.rows.shape
    candidates = len(x.candidate_bits)
    grad_rows = torch.empty_like(x.rows, memory_format=torch.contiguous_format)
    grad_row_probabilities = x.rows.new_empty((0 if x.probabilities is None else num_rows, candidates))
    programs = min(triton.cdiv(num_rows, block_shape(dim)[0]), _BACKWARD_PROGRAMS)
    partial_alpha = x.rows.new_empty((programs, candidates))
    partial_beta = x.rows.new_empty((programs, dim))
    if programs:
        _backward_kernel[(programs,)](
            grad.contiguous(),
            *_pointers(x),
            x.gradient_scale.contiguous(),
            grad_rows,
            grad_row_probabilities,
            partial_alpha,
            partial_beta,
            num_rows,
            programs,
            dim,
            CANDIDATES_BLOCK=triton.next_power_of_2(candidates),
            **_constants(x),
        )
    grad_probabilities = grad_zero_rows = None
    if x.probabilities is not None:
        grad_probabilities = segment_sum(grad_row_probabilities, None, x.line, x.probabilities.shape[0])
    if x.zero_rows is not None:
        grad_zero_rows = segment_sum(grad, _weight_of_zero(x), x.table, x.zero_rows.shape[0])
    return Gradients(
        grad_rows, grad_probabilities, partial_alpha.sum(0) * x.gradient_scale, partial_beta.sum(0), grad_zero_rows
    )


def _weight_of_zero(x: RowsToQuantize) -> Tensor:
    """How much of each row is its zero row, [N]."""
    columns = [k for k, bits in enumerate(x.candidate_bits) if bits == 0]
    if x.probabilities is not None:
        return x.probabilities[:, columns].sum(1)[x.line.long()]
    return (x.line == columns[0] if columns else torch.zeros_like(x.line)).to(x.rows.dtype)


def _pointers(x: RowsToQuantize) -> tuple[Tensor, ...]:
    """What both kernels read; in the place of what there is not, something that they do not."""
    rows = x.rows.contiguous()
    return (
        rows,
        x.line.contiguous(),
        rows if x.probabilities is None else x.probabilities.contiguous(),
        x.alpha.contiguous(),
        x.beta.contiguous(),
        rows if x.zero_rows is None else x.zero_rows.contiguous(),
        x.table.contiguous(),
    )


def _constants(x: RowsToQuantize) -> dict[str, int | bool]:
    block_rows, block_dim = block_shape(x.rows.shape[1])
    return {
        "SEARCH": x.probabilities is not None,
        "WIDTHS": sum(bits << (4 * k) for k, bits in enumerate(x.candidate_bits)),  # 4 bits each
        "CANDIDATES": len(x.candidate_bits),
        "ZERO_ROWS": x.zero_rows is not None,
        "BLOCK_ROWS": block_rows,
        "BLOCK_DIM": block_dim,
    }


def _check_dtypes(x: RowsToQuantize) -> None:
    dtype = x.rows.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rows must be float32 or float64, got {dtype}")
    for name in ("probabilities", "alpha", "beta", "zero_rows", "gradient_scale"):
        tensor: Tensor | None = getattr(x, name)
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} like rows, got {tensor.dtype}")
