"""A table's counts out of those of many."""

from collections.abc import Mapping

from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig


def counts_of_table(counts: Mapping[str, Tensor], table: EmbeddingBagConfig) -> Tensor:
    """The lookups of each row of a table, [num_embeddings].

    Args:
        counts (Mapping[str, Tensor]): by table name, for example a FrequencyCounter.
        table (EmbeddingBagConfig): the table.

    Raises:
        KeyError: no counts for the table.
        ValueError: if they are of another number of rows.
    """
    if table.name not in counts:
        raise KeyError(f"no counts for table {table.name}; counted tables: {', '.join(sorted(counts)) or 'none'}")
    found = counts[table.name]
    if len(found) != table.num_embeddings:
        raise ValueError(f"table {table.name} has {table.num_embeddings} rows, its counts {len(found)}")
    return found
