"""Unsharded modules: the trained collection and the packed one."""

from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.modules.fbgemm_embedding_bags import FbgemmTableBatchedEmbeddingBags
from torchrec_mpe.modules.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.modules.packed_table_batched_embedding_bags import PackedTableBatchedEmbeddingBags

__all__ = [
    "FbgemmTableBatchedEmbeddingBags",
    "MPEEmbeddingBagCollection",
    "PackedEmbeddingBagCollection",
    "PackedTableBatchedEmbeddingBags",
    "Phase",
]
