"""TorchRec's embedding kernel over low-precision rows with a full-precision cache."""

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding_types import (
    EmbeddingComputeKernel,
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
    ShardingType,
)
from torchrec.optim.fused import FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.table_spec import CachedTableSpec
from torchrec_mpe.distributed.row_shard import shard_offsets
from torchrec_mpe.upstream.pooled_lookup import OwnEmbeddingKernel
from torchrec_mpe.upstream.tbe import BoundsCheckMode

CACHED_KERNEL = EmbeddingComputeKernel.CUSTOMIZED_KERNEL

# Of FBGEMM's own cache, which the TBE of slots does not have.
_OF_FBGEMM_CACHE = (
    "cache_algorithm",
    "cache_load_factor",
    "cache_precision",
    "cache_reserved_memory",
    "enforce_hbm",
    "multipass_prefetch_config",
    "prefetch_pipeline",
)

WideRows = Callable[[str, int, int], Tensor | None]


class CachedFusedOptimizer(FusedOptimizer):
    """The fused optimizer of a cached TBE, as EmbeddingFusedOptimizer is of a TBE: its learning rate.

    Its state has no tensors: a row's optimizer state is stored with the row.

    Args:
        tables (Iterable[str]): names of the TBE's tables.
        emb_module (CachedTableBatchedEmbeddingBags): the TBE.
    """

    def __init__(self, tables: list[str], emb_module: CachedTableBatchedEmbeddingBags) -> None:
        self._emb_module = emb_module
        # Empty: no tensor holds the rows. Their names are what schedules and checkpoints ask for.
        params = {f"{table}.weight": torch.empty(0) for table in dict.fromkeys(tables)}
        super().__init__(params, {}, [{"params": list(params.values()), "lr": emb_module.get_learning_rate()}])

    @property
    def emb_module(self) -> CachedTableBatchedEmbeddingBags:
        return self._emb_module

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Hand the learning rate to the TBE."""
        self._set_learning_rate()

    def step(self, closure: Any = None) -> None:
        """Hand the learning rate to the TBE, which has updated its rows in backward."""
        self._set_learning_rate()

    def set_optimizer_step(self, step: int) -> None:
        """Of the TBE."""
        self._emb_module.set_optimizer_step(step)

    def _set_learning_rate(self) -> None:
        group = next(iter(self.param_groups))
        self._emb_module.set_learning_rate(float(group["lr"]))


class CachedEmbeddingBag(OwnEmbeddingKernel, FusedOptimizerModule):
    """In place of BatchedFusedEmbeddingBag, with a cached TBE instead of one that holds all rows in fp32.

    Args:
        config (GroupedEmbeddingConfig): tables or shards that share a TBE.
        caches (Mapping[str, CacheConfig]): of the tables, by name.
        wide_rows (Callable): of a table's name, first and last row + 1: which are stored in 8 bits and the others in 4,
            bool; None if the table's CacheConfig says it of all.
        pg, device, sharding_type: as BatchedFusedEmbeddingBag.
    """

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        caches: Mapping[str, CacheConfig],
        wide_rows: WideRows,
        pg: Any = None,
        device: torch.device | None = None,
        sharding_type: ShardingType | None = None,
    ) -> None:
        super().__init__(config, pg, device, sharding_type)
        fused_params = {k: v for k, v in (config.fused_params or {}).items() if k not in _OF_FBGEMM_CACHE}
        self._emb_module = CachedTableBatchedEmbeddingBags(
            [_spec(table, caches[table.name], wide_rows) for table in config.embedding_tables],
            self.feature_table_map,
            self.pooling_mode,
            device,
            **{"bounds_check_mode": BoundsCheckMode.WARNING, **fused_params},
        )
        self._optim = CachedFusedOptimizer(config.table_names(), self._emb_module)

    @property
    def emb_module(self) -> CachedTableBatchedEmbeddingBags:
        return self._emb_module

    @property
    def fused_optimizer(self) -> CachedFusedOptimizer:
        return self._optim

    def prefetch(self, features: KeyedJaggedTensor, forward_stream: Any = None) -> None:
        """Move the rows of a batch that is to be looked up into the cache."""
        self._emb_module.prefetch(*self.ids_and_offsets(features), forward_stream, _batch_sizes(features))

    def forward(self, features: KeyedJaggedTensor, vbe_output: Any = None, vbe_output_offsets: Any = None) -> Tensor:
        """Pooled embeddings, or rows without pooling, as BatchedFusedEmbeddingBag.

        Raises:
            NotImplementedError: for an output to write into.
        """
        if vbe_output is not None:
            raise NotImplementedError("a cached table's lookup returns its output and writes into no other's")
        weights = features.weights_or_none()
        if weights is not None and not torch.is_floating_point(weights):
            weights = None
        indices, offsets = self.ids_and_offsets(features)
        pooled: Tensor = self._emb_module(
            indices, offsets, weights, batch_size_per_feature_per_rank=_batch_sizes(features)
        )
        return pooled

    def flush(self) -> None:
        self._emb_module.flush()

    def purge(self) -> None:
        self._emb_module.reset_cache_states()

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Nothing: the stores are :class:`torchrec_mpe.distributed.cached_state.CachedState`'s."""
        if self._emb_module.waits_for_backward:
            gc.collect()  # rows of a graph that was dropped must not be written later, over a store that was loaded
        self.flush()
        return {} if destination is None else destination

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """None: backward updates the rows, wherever they are."""
        yield from ()

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """None, as of BatchedFusedEmbeddingBag."""
        yield from ()


def _spec(table: ShardedEmbeddingTable, cache: CacheConfig, wide_rows: WideRows) -> CachedTableSpec:
    row, column = shard_offsets(table)
    wide = wide_rows(table.name, row, row + table.local_rows)
    # A rank may have none of a small table's rows: one that is never looked up stands for them.
    rows = max(table.local_rows, 1)
    if wide is not None and table.local_rows == 0:
        wide = torch.zeros(1, dtype=torch.bool)
    return CachedTableSpec(table.name, rows, table.local_cols, cache, wide, row, column)


def _batch_sizes(features: KeyedJaggedTensor) -> list[list[int]] | None:
    variable: list[list[int]] = features.stride_per_key_per_rank()
    return variable if features.variable_stride_per_key() else None
