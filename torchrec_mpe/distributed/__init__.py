"""The collection sharded over ranks."""

from torchrec_mpe.distributed.embeddingbag import (
    MPEEmbeddingBagCollectionSharder,
    ShardedMPEEmbeddingBagCollection,
    sharders,
)

__all__ = ["MPEEmbeddingBagCollectionSharder", "ShardedMPEEmbeddingBagCollection", "sharders"]
