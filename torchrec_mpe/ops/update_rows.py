"""Writing packed rows in place, while others look up."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.ops import library
from torchrec_mpe.ops.backends import implementation, register
from torchrec_mpe.ops.reference import update_rows as reference


def update_rows_(weights: Tensor, starts: Tensor, rows: Tensor, *, backend: str | None = None) -> None:
    """Overwrite packed rows of one size.

    On the CPU other threads may look up the same weights meanwhile: :func:`packed_embedding_bag` finds every row as it
    was or as it is to be, never half of each. About a thousand rows are written at a time, and lookups go on between.
    They are kept apart by the storage of ``weights``: views of it will do, a second mapping of its memory will not. A
    lookup of the C++ operators waits for no write of backend "reference", which is for hosts without them. On CUDA the
    rows are written in the order of the current stream.

    Args:
        weights (Tensor): uint8 [P], contiguous, as :class:`torchrec_mpe.packing.packed_tables.PackedTables` has it.
        starts (Tensor): int64 [n], the byte of ``weights`` where each row starts, no two alike.
        rows (Tensor): uint8 [n, bytes of a row], as :func:`quantize_and_pack` returns them.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Raises:
        TypeError: if a tensor has another dtype.
        ValueError: if shapes or devices do not fit, or a row leaves ``weights``; then nothing is written.
    """
    for name, tensor, dtype in (("weights", weights, torch.uint8), ("starts", starts, torch.int64)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if rows.dtype != torch.uint8:
        raise TypeError(f"rows must be torch.uint8, got {rows.dtype}")
    if weights.dim() != 1 or not weights.is_contiguous() or starts.dim() != 1 or rows.dim() != 2:
        raise ValueError(
            f"weights must be [P], contiguous, starts [n] and rows [n, row_bytes], got {list(weights.shape)}, "
            f"{list(starts.shape)} and {list(rows.shape)}"
        )
    if rows.shape[0] != starts.shape[0] or rows.shape[1] < 1:
        raise ValueError(f"{starts.shape[0]} starts need as many rows of at least one byte, got {list(rows.shape)}")
    if not weights.device == starts.device == rows.device:
        raise ValueError(
            f"weights, starts and rows must be on one device, got {weights.device}, {starts.device} and {rows.device}"
        )
    if not starts.numel():
        return
    first, last = int(starts.min()), int(starts.max())
    if first < 0 or last + rows.shape[1] > weights.numel():
        raise ValueError(
            f"rows of {rows.shape[1]} bytes from bytes {first} to {last} on leave the {weights.numel()} of weights"
        )
    # The C++ lookup has a lock of its own, which the C++ operator takes.
    with reference.ROWS_LOCK if weights.device.type == "cpu" else nullcontext():
        implementation("update_rows_", backend)(weights, starts, rows)


def _fake(*arguments: Any) -> None:
    return None


register("update_rows_", "triton", reference.update_rows_)
if library.is_loaded():
    register("update_rows_", "cpu", torch.ops.torchrec_mpe.update_rows_)
    torch.library.impl("torchrec_mpe::update_rows_", "CUDA", reference.update_rows_)
    torch.library.register_fake("torchrec_mpe::update_rows_", _fake)
