"""The order in which pooled variable batches lie in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rank_after_rank(parts: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> Tensor:
    """Variable batches one after the other as FBGEMM's TBE returns them and output dist takes them.

    Args:
        parts (Sequence[Tensor]): of a feature each, its bags [bags, dim], those of one rank after those of another; or
            flat and of several features.
        sizes (Sequence[Sequence[int]]): by part, how many of its bags, or elements, are of each rank.

    Returns:
        Tensor: flat, rank after rank, and within a rank part after part.
    """
    by_rank = zip(*(part.split(list(of_ranks)) for part, of_ranks in zip(parts, sizes, strict=True)), strict=True)
    return torch.cat([chunk.flatten() for of_rank in by_rank for chunk in of_rank])
