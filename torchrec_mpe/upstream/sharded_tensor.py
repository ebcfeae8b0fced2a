"""Torch's ShardedTensor, which TorchRec's state dicts are made of, and how one is made from local shards."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata as ShardMetadata
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.api import ShardedTensor as ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata as ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard as Shard


def from_local_shards(
    shards: Sequence[Shard], metadata: ShardedTensorMetadata, group: dist.ProcessGroup | None
) -> ShardedTensor:
    """A ShardedTensor of this rank's shards, where each rank knows all shards' places: nothing is exchanged."""
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        list(shards), sharded_tensor_metadata=metadata, process_group=group
    )


def like_shards_of(tensor: ShardedTensor, shards: Sequence[Shard]) -> ShardedTensor:
    """A ShardedTensor that is sharded like another one, with other values."""
    return from_local_shards(shards, tensor.metadata(), tensor._process_group)


def gather_places(shards: Sequence[Shard], *size: int, group: dist.ProcessGroup | None) -> Any:
    """A ShardedTensor of this rank's shards, whose places the other ranks are told. Collective."""
    return init_from_local_shards(list(shards), *size, process_group=group)
