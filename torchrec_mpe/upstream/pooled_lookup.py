"""TorchRec's lookup of the pooled tables of one sharding, and its embedding kernels, open to ours."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag, BatchedDenseEmbeddingBag
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardingType
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.upstream.variable_batches import rank_after_rank

EmbeddingKernel: TypeAlias = BaseBatchedEmbeddingBag


class OwnEmbeddingKernel(BaseBatchedEmbeddingBag[Tensor]):
    """An embedding kernel, apart from its TBE; arguments as BaseBatchedEmbeddingBag."""

    @property
    def feature_table_map(self) -> list[int]:
        """The number of each feature's table."""
        tables: list[int] = self._feature_table_map
        return tables

    @property
    def pooling_mode(self) -> Any:
        """FBGEMM's PoolingMode of all its tables, SUM where the mean is taken after output dist."""
        return self._pooling

    def ids_and_offsets(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """What a TBE takes, in the integer types that the fused parameters ask for."""
        return (
            features.values().to(self._embedding_table_index_type),
            features.offsets().to(self._embedding_table_offset_type),
        )


class PooledLookup(GroupedPooledEmbeddingsLookup):
    """TorchRec's GroupedPooledEmbeddingsLookup, of which subclasses change how kernels are made and looked up.

    Variable batches of several kernels are put together from the kernels' own outputs, unless all write into one.

    Args:
        sharding (EmbeddingSharding): a pooled one, whose own ``create_lookup`` makes what this class derives from.
    """

    def __init__(self, sharding: Any) -> None:
        super().__init__(**lookup_arguments(sharding))

    # What subclasses override.

    def create_kernel(
        self, config: GroupedEmbeddingConfig, device: Any, pg: Any, sharding_type: Any, env: Any
    ) -> EmbeddingKernel:
        """The kernel of some tables; called while this object is being made."""
        return super()._create_embedding_kernel(config, device, pg, sharding_type, env)

    def look_up(self, kernel: EmbeddingKernel, features: KeyedJaggedTensor) -> Tensor:
        """The pooled embeddings of a kernel's features, as the kernel returns them."""
        pooled: Tensor = kernel(features)
        return pooled

    def writes_into_one_output(self, device: torch.device) -> bool:
        """Whether the kernels write variable batches into one output: FBGEMM has none on CPU."""
        return device.type != "cpu"

    # What they use.

    @property
    def kernels(self) -> list[EmbeddingKernel]:
        """Of groups of tables, in the order of their features."""
        return list(self._emb_modules)

    @property
    def gradient_factor(self) -> float:
        """By which per-sample weights' gradients are multiplied, as those of output dist are divided."""
        factor: float = self._scale_gradient_factor
        return factor

    def kernels_and_features(
        self, sparse_features: KeyedJaggedTensor
    ) -> Iterator[tuple[EmbeddingKernel, KeyedJaggedTensor]]:
        """Each kernel with its part of a batch."""
        if self._emb_modules:
            yield from zip(self._emb_modules, sparse_features.split(self._feature_splits), strict=True)

    # TorchRec's.

    def _create_embedding_kernel(self, *args: Any) -> EmbeddingKernel:
        return self.create_kernel(*args)

    def _forward(self, features_by_group: list[KeyedJaggedTensor]) -> list[Tensor]:
        """TorchRec's, with :meth:`look_up`."""
        pooled: list[Tensor] = []
        for config, kernel, features, score in zip(
            self.grouped_configs,
            self._emb_modules,
            features_by_group,
            self._feature_score_auto_collections,
            strict=True,
        ):
            features = self._apply_feature_processor_and_gradient_scaling(features, config, score)
            pooled.append(self.look_up(kernel, features))
            if self.optim_state_tracker_fn is not None:
                self.optim_state_tracker_fn(features, pooled[-1], kernel)
        return pooled

    def _forward_with_vbe_merging(self, features_by_group: list[KeyedJaggedTensor], device: torch.device) -> Tensor:
        if self.writes_into_one_output(device):
            merged: Tensor = super()._forward_with_vbe_merging(features_by_group, device)
            return merged
        sizes: list[list[int]] = []  # by kernel, of each rank's part
        for config, features in zip(self.grouped_configs, features_by_group, strict=True):
            by_rank = zip(*features.stride_per_key_per_rank(), strict=True)
            dims = config.embedding_dims()
            sizes.append([sum(b * d for b, d in zip(of_rank, dims, strict=True)) for of_rank in by_rank])
        return rank_after_rank(self._forward(features_by_group), sizes)


def lookup_arguments(sharding: Any) -> dict[str, Any]:
    """What ``sharding.create_lookup()`` makes its GroupedPooledEmbeddingsLookup with."""
    arguments = {"grouped_configs": _own_configs(sharding), "device": sharding._device, "env": sharding._env}
    if isinstance(sharding, DpPooledEmbeddingSharding):
        return {**arguments, "pg": sharding._env.process_group, "scale_weight_gradients": False}
    if isinstance(sharding, RwPooledEmbeddingSharding):
        arguments["sharding_type"] = ShardingType.ROW_WISE
    elif isinstance(sharding, TwRwPooledEmbeddingSharding | GridPooledEmbeddingSharding):
        arguments["sharding_type"] = ShardingType.TABLE_ROW_WISE
    return {**arguments, "pg": sharding._pg}


def _own_configs(sharding: Any) -> list[GroupedEmbeddingConfig]:
    if isinstance(sharding, DpPooledEmbeddingSharding):
        own: list[GroupedEmbeddingConfig] = sharding._grouped_embedding_configs
    else:
        own = sharding._grouped_embedding_configs_per_rank[sharding._rank]
    return own


def configs_of_ranks(sharding: Any) -> list[list[GroupedEmbeddingConfig]]:
    """Each rank's groups of tables in a sharding, one for each of its kernels; empty if it is data-parallel."""
    if isinstance(sharding, DpPooledEmbeddingSharding):
        return []
    groups: list[list[GroupedEmbeddingConfig]] = sharding._grouped_embedding_configs_per_rank
    return groups


def without_data_parallel(lookup: Any) -> Any:
    """The lookup itself, where TorchRec has wrapped it because its tables are data-parallel."""
    return lookup.module if isinstance(lookup, DistributedDataParallel) else lookup


def dense_rows_of_features(kernel: EmbeddingKernel) -> list[Tensor] | None:
    """All rows of each feature's table, [rows, columns], with gradients; None of any but a dense kernel."""
    if not isinstance(kernel, BatchedDenseEmbeddingBag):
        return None
    # Not split_embedding_weights(), which detaches them. One split for all tables, whose backward is one concatenation:
    # that of a slice makes a gradient as large as all tables.
    tbe = kernel.emb_module
    parts = tbe.weights.split([rows * dim for rows, dim in tbe.embedding_specs])
    weights = [part.view(spec) for part, spec in zip(parts, tbe.embedding_specs, strict=True)]
    tables = zip(weights, kernel.config.embedding_tables, strict=True)
    return [rows for rows, table in tables for _ in range(table.num_features())]
