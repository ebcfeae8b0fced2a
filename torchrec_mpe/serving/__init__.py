"""Packed models spread over the devices of one host, in Python, TorchRec's quantized-inference flow and TorchScript."""

from torchrec_mpe.serving.replicas import ReplicatedModel
from torchrec_mpe.serving.shard import shard_packed
from torchrec_mpe.serving.sharded_collection import LEAF_MODULES, ShardedPackedEmbeddingBagCollection
from torchrec_mpe.serving.sharder import PackedEmbeddingBagCollectionSharder

__all__ = [
    "LEAF_MODULES",
    "PackedEmbeddingBagCollectionSharder",
    "ReplicatedModel",
    "ShardedPackedEmbeddingBagCollection",
    "shard_packed",
]
