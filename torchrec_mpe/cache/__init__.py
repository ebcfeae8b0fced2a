"""Training in low precision with a full-precision cache (arXiv 2010.11305)."""

from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.from_frequencies import caches_from_frequencies
from torchrec_mpe.cache.statistics import CacheStatistics
from torchrec_mpe.cache.table_spec import CachedTableSpec

__all__ = [
    "CacheConfig",
    "CacheStatistics",
    "CachedTableBatchedEmbeddingBags",
    "CachedTableSpec",
    "caches_from_frequencies",
]
