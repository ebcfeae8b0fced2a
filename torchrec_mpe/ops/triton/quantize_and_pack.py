"""Float rows to packed rows in one pass."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
import torch
import triton
import triton.language as tl
from torch import Tensor

from torchrec_mpe.ops.triton.device import check_device
from torchrec_mpe.ops.triton.rounding import divide, round_to_code

_PROGRAM_BLOCKS = 256


@triton.jit(do_not_specialize=["num_blocks"])
def _pack_kernel(
    rows,
    alpha,
    beta,
    packed,
    num_blocks,
    row_blocks,
    dim,
    BITS: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
):
    # Rows are padded to whole blocks, so blocks and their bytes follow each other through all rows.
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < num_blocks
    row = block // row_blocks
    first = (block % row_blocks) * 8
    step = tl.load(alpha)
    high = (1 << (BITS - 1)) - 1.0
    stream = tl.zeros([BLOCKS], dtype=tl.uint64)
    for j in tl.static_range(8):
        mask = live & (first + j < dim)
        x = tl.load(rows + row * dim + first + j, mask=mask, other=0.0)
        offset = tl.load(beta + first + j, mask=mask, other=0.0)
        signed, _ = round_to_code(divide(x - offset, tl.zeros_like(x) + step), -high - 1, high)
        code = tl.where(mask, signed + (high + 1), 0.0).to(tl.int32)
        stream |= code.to(tl.uint64) << (j * BITS)
    for byte in tl.static_range(BITS):
        tl.store(packed + block * BITS + byte, (stream >> (8 * byte)).to(tl.uint8), mask=live)


def quantize_and_pack(rows: Tensor, bits: int, alpha: Tensor, beta: Tensor) -> Tensor:
    """See :func:`torchrec_mpe.ops.quantize_and_pack`, which checks the arguments.

    Raises:
        ValueError: for CPU tensors outside Triton's interpreter.
    """
    check_device(rows)
    num_rows, dim = rows.shape
    row_blocks = triton.cdiv(dim, 8)
    packed = torch.empty((num_rows, row_blocks * bits), dtype=torch.uint8, device=rows.device)
    num_blocks = num_rows * row_blocks
    if num_blocks:
        _pack_kernel[(triton.cdiv(num_blocks, _PROGRAM_BLOCKS),)](
            rows.contiguous(),
            alpha.contiguous(),
            beta.contiguous(),
            packed,
            num_blocks,
            row_blocks,
            dim,
            BITS=bits,
            BLOCKS=_PROGRAM_BLOCKS,
        )
    return packed
