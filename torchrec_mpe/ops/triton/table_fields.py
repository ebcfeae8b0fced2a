"""What one launch for many tables knows of each: an int64 [T, fields] tensor of sizes and addresses."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def pointer(fields, FIELD: tl.constexpr, dtype: tl.constexpr):  # noqa: N803
    """The pointer whose address is one of a table's fields."""
    return tl.load(fields + FIELD).to(tl.pointer_type(dtype))


def address(tensor: Tensor, device: torch.device, name: str) -> int:
    """Where a tensor lies, for kernels that run on ``device``.

    Pinned host memory has one address for the CPU and the GPU, so a kernel reads and writes it through PCIe or NVLink.

    Raises:
        ValueError: naming the tensor, if it is neither on the device nor in pinned host memory.
    """
    if not tensor.numel():
        return 0
    if tensor.device != device and not (device.type == "cuda" and tensor.is_pinned()):
        raise ValueError(f"{name} must be on {device} or in pinned host memory, not on {tensor.device}")
    return tensor.data_ptr()


def check(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    """Check that a tensor's elements follow each other.

    Raises:
        TypeError: naming the tensor, if it is of another dtype.
        ValueError: naming the tensor, if it is not contiguous.
    """
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def on_device(values: Sequence[object], device: torch.device) -> Tensor:
    """Nested lists of integers as an int64 tensor."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
