"""Caches of several tables that share their memory by frequency."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.precision.counts_of_table import counts_of_table

_BISECTIONS = 100


def caches_from_frequencies(
    counts: Mapping[str, Tensor], tables: Sequence[EmbeddingBagConfig], cache: CacheConfig
) -> dict[str, CacheConfig]:
    """Share the memory of equally large caches out to where the rows are that are looked up most.

    Together the caches hold ``cache.load_factor`` of all elements of all tables, as they would if each had that load
    factor. Each table's holds as many rows as the table has among the rows that are looked up most often for their
    columns, at least one. A table that is small for its lookups is so held whole, and one of many rare rows hardly.

    Args:
        counts (Mapping[str, Tensor]): per table, int64 [num_embeddings] lookups in the training data, for example a
            FrequencyCounter.
        tables (Sequence[EmbeddingBagConfig]): the tables.
        cache (CacheConfig): what all have in common, and the load factor of all together.

    Returns:
        Dict[str, CacheConfig]: by table name, for CachedEmbeddingBagCollection.

    Raises:
        KeyError: no counts for a table.
        ValueError: if counts are of the wrong size.

    Example::

        caches = caches_from_frequencies(counts, tables, CacheConfig(bits=4, load_factor=0.01))
        collection = CachedEmbeddingBagCollection(tables, device=meta, cache=caches)
    """
    lookups = [counts_of_table(counts, table) for table in tables]
    dims: list[int] = [table.embedding_dim for table in tables]
    budget = cache.load_factor * sum(table.num_embeddings * table.embedding_dim for table in tables)

    def rows_above(lookups_per_column: float) -> list[int]:
        return [int((c > lookups_per_column * dim).sum()) for c, dim in zip(lookups, dims, strict=True)]

    def elements(rows: Sequence[float]) -> float:
        return float(sum(n * dim for n, dim in zip(rows, dims, strict=True)))

    low, high = -1.0, max(float(c.max()) / dim for c, dim in zip(lookups, dims, strict=True))
    for _ in range(_BISECTIONS):  # more rows than fit are above low, no more than fit above high
        middle = (low + high) / 2
        if elements(rows_above(middle)) > budget:
            low = middle
        else:
            high = middle
    certain, candidates = rows_above(high), rows_above(low)
    tied = elements(candidates) - elements(certain)  # rows between low and high are looked up equally often
    share = (budget - elements(certain)) / tied if tied else 0.0
    return {
        table.name: replace(cache, load_factor=_load_factor(table, of_certain + share * (of_all - of_certain)))
        for table, of_certain, of_all in zip(tables, certain, candidates, strict=True)
    }


def _load_factor(table: EmbeddingBagConfig, rows: float) -> float:
    return float(min(1.0, max(1.0, rows) / table.num_embeddings))
