"""The collection sharded over ranks."""

from torchrec_mpe.distributed.cached_embeddingbag import (
    CachedEmbeddingBagCollectionSharder,
    ShardedCachedEmbeddingBagCollection,
)
from torchrec_mpe.distributed.default_sharders import sharders
from torchrec_mpe.distributed.embeddingbag import MPEEmbeddingBagCollectionSharder, ShardedMPEEmbeddingBagCollection
from torchrec_mpe.distributed.frequencies import TrackedFrequencies, track_frequencies_

__all__ = [
    "CachedEmbeddingBagCollectionSharder",
    "MPEEmbeddingBagCollectionSharder",
    "ShardedCachedEmbeddingBagCollection",
    "ShardedMPEEmbeddingBagCollection",
    "TrackedFrequencies",
    "sharders",
    "track_frequencies_",
]
