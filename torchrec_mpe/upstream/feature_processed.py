"""TorchRec's feature-processed collections with a collection of ours inside."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.fp_embeddingbag import (
    FeatureProcessedEmbeddingBagCollectionSharder,
    ShardedFeatureProcessedEmbeddingBagCollection,
)
from torchrec.distributed.types import LazyAwaitable, ParameterSharding, ShardingEnv
from torchrec.distributed.utils import append_prefix
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

_COLLECTION = "_embedding_bag_collection"


class PreparedFeatureProcessedEmbeddingBagCollection(FeatureProcessedEmbeddingBagCollection):
    """One whose collection is in a prepared phase.

    TorchRec finds sharders by the exact type: its own would shard the collection inside as a plain one.
    """


def prepare_around_(module: nn.Module) -> None:
    """Let TorchRec's sharder of feature-processed collections pass a module by; nothing to any other module."""
    if type(module) is FeatureProcessedEmbeddingBagCollection:
        module.__class__ = PreparedFeatureProcessedEmbeddingBagCollection


class OpenShardedFeatureProcessedEmbeddingBagCollection(ShardedFeatureProcessedEmbeddingBagCollection):
    """TorchRec's, of whose collection DistributedDataParallel keeps the replicated parameters equal.

    TorchRec takes every parameter of the collection for sharded: quantizers would differ from rank to rank.
    """

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Those of the collection inside."""
        yield from self._embedding_bag_collection.sharded_parameter_names(append_prefix(prefix, _COLLECTION))

    def add_fp_params_grad_sync_callback(
        self, lazy_awaitable_kt: LazyAwaitable[KeyedTensor]
    ) -> LazyAwaitable[KeyedTensor]:
        """TorchRec's, which adds to the pooled embeddings in place: those of quantized rows are a view."""
        parameters = [parameter.flatten() for parameter in self._feature_processors.parameters()]
        zero = self._no_op_zero * torch.cat(parameters).sum()
        lazy_awaitable_kt.callbacks.append(partial(_plus, zero))
        return lazy_awaitable_kt


class FeatureProcessedSharder(FeatureProcessedEmbeddingBagCollectionSharder):
    """Shards the collection inside with the sharder of its type.

    Args:
        sharders (Sequence[EmbeddingBagCollectionSharder]): of the types that it may be of, the plain one first.
        prepared (bool): of collections in a prepared phase.
    """

    def __init__(self, sharders: Sequence[EmbeddingBagCollectionSharder], *, prepared: bool = False) -> None:
        super().__init__(sharders[0])
        self._prepared = prepared
        self._by_type = {sharder.module_type: sharder for sharder in sharders}

    def shard(
        self,
        module: FeatureProcessedEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> OpenShardedFeatureProcessedEmbeddingBagCollection:
        """The sharded module of this rank."""
        inner = type(collection_inside(module))
        sharder = self._by_type.get(inner)
        if sharder is None:
            raise TypeError(f"{module_fqn or type(module).__name__}: there is no sharder of the {inner.__name__} in it")
        on = torch.device("cuda") if device is None else device
        return OpenShardedFeatureProcessedEmbeddingBagCollection(module, params, sharder, env, on, module_fqn)

    @property
    def module_type(self) -> type[FeatureProcessedEmbeddingBagCollection]:
        return (
            PreparedFeatureProcessedEmbeddingBagCollection if self._prepared else FeatureProcessedEmbeddingBagCollection
        )

    @property
    def sharded_module_type(self) -> type[OpenShardedFeatureProcessedEmbeddingBagCollection]:
        return OpenShardedFeatureProcessedEmbeddingBagCollection


def _plus(zero: torch.Tensor, pooled: KeyedTensor) -> KeyedTensor:
    pooled._values = pooled._values + zero
    return pooled


def collection_inside(module: nn.Module) -> nn.Module | None:
    """The collection of a feature-processed one, plain or sharded; None of any other module."""
    kinds = FeatureProcessedEmbeddingBagCollection | ShardedFeatureProcessedEmbeddingBagCollection
    inner: nn.Module | None = module._embedding_bag_collection if isinstance(module, kinds) else None
    return inner


def sharded_collection_inside(module: nn.Module) -> ShardedEmbeddingBagCollection | None:
    """The sharded collection of a sharded feature-processed one; None of any other module."""
    inner = collection_inside(module)
    return inner if isinstance(inner, ShardedEmbeddingBagCollection) else None


def unsharded_around(module: nn.Module, collection: Any) -> FeatureProcessedEmbeddingBagCollection:
    """Of a sharded feature-processed collection, one with copies of its processors and ``collection`` inside."""
    processors: Any = copy.deepcopy(module._feature_processors)
    for processor in processors.modules():
        if hasattr(
            processor, "_pre_processed"
        ):  # on its way through row-wise sharding a batch has its positions with it
            processor._pre_processed = False
    given = dict(processors.items()) if isinstance(processors, nn.ModuleDict) else processors
    return FeatureProcessedEmbeddingBagCollection(collection, given)
