"""A table's counts out of those of many."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MOST_LOOKUPS = 2**53  # of a table: float64, in which frequencies are weighed, has no more whole numbers


def counts_of_table(counts: Mapping[str, Tensor], table: EmbeddingBagConfig) -> Tensor:
    """The lookups of each row of a table, integers [num_embeddings].

    Args:
        counts (Mapping[str, Tensor]): by table name, for example a FrequencyCounter.
        table (EmbeddingBagConfig): the table.

    Raises:
        KeyError: no counts for the table.
        ValueError: naming the table and its features, if they are no integers, of another shape, below zero, or more
            than 2**53 in all.
    """
    if table.name not in counts:
        raise KeyError(f"no counts for table {table.name}; counted tables: {', '.join(sorted(counts)) or 'none'}")
    found = counts[table.name]
    where = f"counts of table {table.name} (features {', '.join(table.feature_names)})"
    if not isinstance(found, Tensor) or found.dtype not in _INTEGERS or found.is_meta:
        kind = type(found).__name__ if not isinstance(found, Tensor) else "on meta" if found.is_meta else found.dtype
        raise ValueError(f"{where} must be a tensor of integers, they are {kind}: count_frequencies makes them")
    if found.dim() == 1 and len(found) != table.num_embeddings:
        raise ValueError(f"table {table.name} has {table.num_embeddings} rows, its counts {len(found)}")
    if found.dim() != 1:
        raise ValueError(f"{where} must be of shape [{table.num_embeddings}], it is {list(found.shape)}")
    if len(found) and int(found.min()) < 0:
        raise ValueError(f"{where}: row {int(found.argmin())} has {int(found.min())} lookups")
    total = float(found.sum(dtype=torch.float64))
    if total > _MOST_LOOKUPS:
        raise ValueError(f"{where} add up to {total:.3g} lookups, more than 2**53: they are not what was counted")
    return found
