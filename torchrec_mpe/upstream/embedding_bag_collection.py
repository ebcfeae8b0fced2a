"""Fields of TorchRec's EmbeddingBagCollections that have no accessor."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mpe.upstream.pooled_lookup import without_data_parallel


def set_device(collection: EmbeddingBagCollection, device: torch.device) -> None:
    """Let a collection whose tables were replaced say where they are."""
    collection._device = device


def tables_of_sharded(collection: ShardedEmbeddingBagCollection) -> list[EmbeddingBagConfig]:
    """The configs of a sharded collection's tables, the same on every rank."""
    tables: list[EmbeddingBagConfig] = collection._embedding_bag_configs
    return tables


def is_weighted(collection: EmbeddingBagCollection | ShardedEmbeddingBagCollection) -> bool:
    """Whether a collection's features carry per-sample weights."""
    sharded = isinstance(collection, ShardedEmbeddingBagCollection)
    weighted: bool = collection._is_weighted if sharded else collection.is_weighted()
    return weighted


def group_of_sharded(module: ShardedEmbeddingModule) -> dist.ProcessGroup | None:
    """The ranks that a module's tables are sharded over."""
    group: dist.ProcessGroup | None = module._env.process_group
    return group


def device_of_sharded(module: ShardedEmbeddingModule) -> torch.device:
    """Where this rank's shards are looked up."""
    device: torch.device = module._device
    return device


def tbes_of_sharded(module: ShardedEmbeddingModule) -> Iterator[nn.Module]:
    """The table-batched embeddings of this rank's shards, which are no submodules to torch."""
    for lookup in module._lookups:
        for kernel in without_data_parallel(lookup)._emb_modules:
            yield kernel.emb_module
