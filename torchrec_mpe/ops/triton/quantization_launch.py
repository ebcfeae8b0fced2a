"""How the quantization kernels cut their work."""

# mypy: disable-error-code="import-untyped"
import torch
import triton
from torch import Tensor

BACKWARD_PROGRAMS = 1024
"""Programs of a backward kernel at most; each leaves one line of partial sums."""

_BLOCK_ELEMENTS = 1024


def block_shape(dim: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, powers of two; a row is never cut."""
    columns = triton.next_power_of_2(dim)
    return max(1, _BLOCK_ELEMENTS // columns), columns


def packed_widths(candidate_bits: tuple[int, ...]) -> int:
    """Candidate bit-widths as one compile-time constant, 4 bits each."""
    return sum(bits << (4 * k) for k, bits in enumerate(candidate_bits))


def check_dtypes(rows: Tensor, **others: Tensor | None) -> None:
    """Check that all floating tensors are float32 or all float64.

    Raises:
        TypeError: naming the tensor.
    """
    if rows.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rows must be float32 or float64, got {rows.dtype}")
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != rows.dtype:
            raise TypeError(f"{name} must be {rows.dtype} like rows, got {tensor.dtype}")
