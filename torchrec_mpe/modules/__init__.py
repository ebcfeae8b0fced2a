"""Unsharded modules: the trained collection and the packed one."""

from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.modules.packed_embedding_bag_collection import PackedEmbeddingBagCollection

__all__ = ["MPEEmbeddingBagCollection", "PackedEmbeddingBagCollection", "Phase"]
