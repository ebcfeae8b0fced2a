"""Unsharded modules: the trained collection and the packed one."""

from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase

__all__ = ["MPEEmbeddingBagCollection", "Phase"]
