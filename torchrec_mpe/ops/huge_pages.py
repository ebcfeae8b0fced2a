"""Large tensors in huge pages, whose rows are found with fewer misses of the TLB."""

import contextlib
import mmap

import torch
from torch import Tensor

_HUGE = 2 << 20
_SMALLEST = 2 * _HUGE  # below, rounding up to huge pages would show


def zeros_in_huge_pages(rows: int, row_bytes: int) -> Tensor:
    """A uint8 tensor [rows, row_bytes] of zeros in host memory, in huge pages where Linux has them to give.

    Looking up random rows of 67 bytes among 8e6 took a fifth to a third less time in them: half of a miss is the TLB's.
    """
    size = rows * row_bytes
    if size < _SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(rows, row_bytes, dtype=torch.uint8)
    # Private: what is shared is not backed by huge pages.
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them gives pages of the usual size
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % _HUGE
    return whole[first : first + size].view(rows, row_bytes)
