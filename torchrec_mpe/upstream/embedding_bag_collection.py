"""Fields of TorchRec's EmbeddingBagCollections that have no accessor."""

import torch
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection


def set_device(collection: EmbeddingBagCollection, device: torch.device) -> None:
    """Let a collection whose tables were replaced say where they are."""
    collection._device = device


def tables_of_sharded(collection: ShardedEmbeddingBagCollection) -> list[EmbeddingBagConfig]:
    """The configs of a sharded collection's tables, the same on every rank."""
    tables: list[EmbeddingBagConfig] = collection._embedding_bag_configs
    return tables
