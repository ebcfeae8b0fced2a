"""The order of a table's rows by frequency."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from torchrec_mpe.precision.row_initialization import splitmix64


def is_in_frequency_order(counts: Tensor) -> bool:
    """Whether row ids already are in frequency order: ``counts`` [num_embeddings] never increases."""
    return bool((counts[1:] <= counts[:-1]).all())


def frequency_order(counts: Tensor) -> Tensor | None:
    """The place of every row in the frequency order, 0 being the most frequent.

    Rows of equal count are put into a fixed pseudo-random order: their ids often follow time or the alphabet, which
    must not decide who gets more bits.

    Args:
        counts (Tensor): int64 [num_embeddings].

    Returns:
        Optional[Tensor]: int32 [num_embeddings], or None when ids already are in frequency order.

    Example::

        frequency_order(torch.tensor([1, 9, 4]))   # tensor([2, 0, 1], dtype=torch.int32)
        frequency_order(torch.tensor([9, 4, 1]))   # None
    """
    if is_in_frequency_order(counts):
        return None
    shuffled = torch.argsort(splitmix64(torch.arange(1, len(counts) + 1, device=counts.device)))
    by_count = shuffled[torch.argsort(counts[shuffled], descending=True, stable=True)]
    places = torch.empty(len(counts), dtype=torch.int32, device=counts.device)
    places[by_count] = torch.arange(len(counts), dtype=torch.int32, device=counts.device)
    return places


def counts_in_order(counts: Tensor, order: Tensor | None) -> Tensor:
    """``counts`` [num_embeddings] in the frequency order, so never increasing."""
    if order is None:
        return counts
    ordered = torch.empty_like(counts)
    ordered[order.long()] = counts
    return ordered


def counts_sha256(counts: Mapping[str, Tensor]) -> str:
    """A digest of table names and their counts, to tell later which counts a plan was made from."""
    digest = hashlib.sha256()
    for table in sorted(counts):
        digest.update(f"{table}/{len(counts[table])}/".encode())
        digest.update(counts[table].to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
