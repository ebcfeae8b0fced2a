"""The collection sharded over ranks."""

from torchrec_mpe.distributed.embeddingbag import (
    MPEEmbeddingBagCollectionSharder,
    ShardedMPEEmbeddingBagCollection,
    sharders,
)
from torchrec_mpe.distributed.frequencies import TrackedFrequencies, track_frequencies_

__all__ = [
    "MPEEmbeddingBagCollectionSharder",
    "ShardedMPEEmbeddingBagCollection",
    "TrackedFrequencies",
    "sharders",
    "track_frequencies_",
]
