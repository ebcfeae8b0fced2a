"""Writing packed rows in pure PyTorch, and the lock that keeps the reference lookup apart from it."""

import threading

import torch
from torch import Tensor

from torchrec_mpe.ops.backends import register

ROWS_LOCK = threading.Lock()
"""Held around the reference lookup's reads of packed rows on the CPU, and around every write of them there."""

_CHUNK_ROWS = 1 << 14


@torch.no_grad()
def update_rows_(weights: Tensor, starts: Tensor, rows: Tensor) -> None:
    """See :func:`torchrec_mpe.ops.update_rows.update_rows_`; of rows with the same start any may stay."""
    places = torch.arange(rows.shape[1], device=weights.device)
    for start, chunk in zip(starts.split(_CHUNK_ROWS), rows.split(_CHUNK_ROWS), strict=True):
        weights[start.unsqueeze(1) + places] = chunk


register("update_rows_", "reference", update_rows_)
