"""Counting lookups in pure PyTorch: the definition, and what runs on CUDA."""

from collections.abc import Sequence

import torch
from torch import Tensor


def count_ids_(
    counts: Tensor, ids: Tensor, ids_per_feature: Sequence[int], first_row: Sequence[int], num_rows: Sequence[int]
) -> None:
    """See :func:`torchrec_mpe.ops.count_ids_`."""
    of_feature = torch.tensor([first_row, num_rows, ids_per_feature], dtype=torch.int64)
    of_feature = of_feature.to(ids.device, non_blocking=True)
    first, rows = (line.repeat_interleave(of_feature[2], output_size=len(ids)) for line in of_feature[:2])
    inside = (ids >= 0) & (ids < rows)
    counts.index_add_(0, torch.where(inside, first + ids, 0), inside.to(counts.dtype))
