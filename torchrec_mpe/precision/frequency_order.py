"""The order of a table's rows by frequency."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from torchrec_mpe.precision.row_initialization import splitmix64


def is_frequency_ranked(counts: Tensor) -> bool:
    """Whether row ids already are frequency ranks: ``counts`` [num_embeddings] never increases."""
    return bool((counts[1:] <= counts[:-1]).all())


def frequency_ranks(counts: Tensor) -> Tensor | None:
    """The frequency rank of every row, rank 0 being the most frequent.

    Rows of equal count are put into a fixed pseudo-random order: their ids often follow time or the alphabet, which
    must not decide who gets more bits.

    Args:
        counts (Tensor): int64 [num_embeddings].

    Returns:
        Optional[Tensor]: int32 [num_embeddings], or None when ids already are frequency ranks.

    Example::

        frequency_ranks(torch.tensor([1, 9, 4]))   # tensor([2, 0, 1], dtype=torch.int32)
        frequency_ranks(torch.tensor([9, 4, 1]))   # None
    """
    if is_frequency_ranked(counts):
        return None
    shuffled = torch.argsort(splitmix64(torch.arange(1, len(counts) + 1, device=counts.device)))
    order = shuffled[torch.argsort(counts[shuffled], descending=True, stable=True)]
    ranks = torch.empty(len(counts), dtype=torch.int32, device=counts.device)
    ranks[order] = torch.arange(len(counts), dtype=torch.int32, device=counts.device)
    return ranks


def counts_by_rank(counts: Tensor, ranks: Tensor | None) -> Tensor:
    """``counts`` [num_embeddings] in the order of ``ranks``, so never increasing."""
    if ranks is None:
        return counts
    ordered = torch.empty_like(counts)
    ordered[ranks.long()] = counts
    return ordered


def counts_sha256(counts: Mapping[str, Tensor]) -> str:
    """A digest of table names and their counts, to tell later which counts a plan was made from."""
    digest = hashlib.sha256()
    for table in sorted(counts):
        digest.update(f"{table}/{len(counts[table])}/".encode())
        digest.update(counts[table].to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
