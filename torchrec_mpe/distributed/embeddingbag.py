"""MPEEmbeddingBagCollection sharded by TorchRec, its rows in FBGEMM's training TBE."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag, BatchedDenseEmbeddingBag
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo
from torchrec.distributed.embedding_types import KJTList, ShardedEmbeddingTable
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import LazyAwaitable, ModuleSharder, ParameterSharding, ShardingEnv, ShardingType
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_mpe.distributed.one_table_lookup import OneTableLookup, can_be_one_table
from torchrec_mpe.initialization import RowInitialization
from torchrec_mpe.modules import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.modules.quantize_and_pool import FeatureLookup, quantize_and_pool
from torchrec_mpe.quantizer import RowQuantizer

_ROWS_SPLIT = (RwPooledEmbeddingSharding, TwRwPooledEmbeddingSharding, GridPooledEmbeddingSharding)


class _QuantizedForward:
    """``forward`` of one embedding kernel: its rows looked up unpooled, quantized, and pooled.

    An object and not a closure, so that a model can be deep-copied.
    """

    def __init__(
        self,
        collection: "ShardedMPEEmbeddingBagCollection",
        lookup: GroupedPooledEmbeddingsLookup,
        kernel: BaseBatchedEmbeddingBag,
        rows_split: bool,
    ) -> None:
        self._collection = collection
        self._lookup = lookup
        self._kernel = kernel
        # Mean pooling over rows of several ranks is a division after output dist, TorchRec's own.
        self._rows_split = rows_split
        self._one_table = OneTableLookup(kernel.emb_module) if can_be_one_table(kernel.emb_module) else None

    def __call__(self, features: KeyedJaggedTensor) -> Tensor:
        kernel = self._kernel
        ids, offsets, bags = features.values(), features.offsets(), features.stride()
        weights = features.weights_or_none()
        starts = [0, *itertools.accumulate(features.length_per_key())]  # of the features' ids
        row_starts = starts  # of the features' rows: fewer than ids if each distinct row was looked up once
        index: Tensor | None = None
        row_offsets: Tensor | None = None
        if self._one_table is not None:
            rows, ids, index, row_offsets = self._one_table(ids, offsets, bags)
            row_starts = row_offsets.tolist()
        elif isinstance(kernel, BatchedDenseEmbeddingBag):
            rows = _rows_of_dense_kernel(kernel, ids, features.length_per_key())
        else:
            rows = type(kernel).forward(kernel, features)
        rows = rows.float()  # a TBE may be told to return FP16, too coarse for step sizes
        pooled: list[Tensor] = []
        for dim, (first, last), lookups, columns in self._runs(kernel):
            start, stop = starts[first], starts[last]
            row_start, row_stop = row_starts[first], row_starts[last]
            # The gradient of a slice is as large as the whole.
            of_run = rows if len(rows) == row_stop - row_start else rows[row_start:row_stop]
            pooled.append(
                quantize_and_pool(
                    self._collection.quantizers()[dim],
                    lookups,
                    of_run,
                    ids[row_start:row_stop],
                    offsets[first * bags : last * bags + 1],
                    [bags] * (last - first),
                    None if weights is None else weights[start:stop],
                    columns,
                    self._lookup._scale_gradient_factor,
                    side_by_side=True,
                    index=None if index is None else index[start:stop],
                    row_offsets=None if row_offsets is None else row_offsets[first : last + 1],
                )
            )
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)

    def _runs(
        self, kernel: BaseBatchedEmbeddingBag
    ) -> Iterator[tuple[int, tuple[int, int], list[FeatureLookup], slice]]:
        """The kernel's features in runs that share embedding dimension and columns."""
        key: tuple[int, int, int] | None = None
        first = last = 0
        lookups: list[FeatureLookup] = []
        for table in kernel.config.embedding_tables:
            row, column = _shard_offsets(table)
            table_key = (table.embedding_dim, column, column + table.local_cols)
            if key is not None and key != table_key:
                yield key[0], (first, last), lookups, slice(key[1], key[2])
                first, lookups = last, []
            key = table_key
            mean = self._collection.pooling_of(table.name) == PoolingType.MEAN and not self._rows_split
            lookups += [FeatureLookup(table.name, mean, table.local_rows, row)] * table.num_features()
            last += table.num_features()
        if key is not None:
            yield key[0], (first, last), lookups, slice(key[1], key[2])


def _shard_offsets(table: ShardedEmbeddingTable) -> tuple[int, int]:
    """First row and first column of a table's local shard."""
    if table.local_metadata is None:
        return 0, 0
    row, column = table.local_metadata.shard_offsets
    return row, column


def _rows_of_dense_kernel(kernel: BatchedDenseEmbeddingBag, ids: Tensor, ids_per_feature: list[int]) -> Tensor:
    """FBGEMM's dense TBE ignores PoolingMode.NONE on CPU, so its rows are gathered here."""
    # Not split_embedding_weights(), which detaches them: the rows' gradient goes through this gather.
    tbe = kernel.emb_module
    offsets = [int(offset) for offset in tbe.weights_physical_offsets]
    weights = [
        tbe.weights[offset : offset + rows * dim].view(rows, dim)
        for offset, (rows, dim) in zip(offsets, tbe.embedding_specs, strict=False)
    ]
    tables = [t for t, table in enumerate(kernel.config.embedding_tables) for _ in range(table.num_features())]
    parts = ids.split(ids_per_feature)
    return torch.cat([F.embedding(part.long(), weights[t]) for part, t in zip(parts, tables, strict=True)])


class ShardedMPEEmbeddingBagCollection(ShardedEmbeddingBagCollection):
    """A ShardedEmbeddingBagCollection that quantizes rows between lookup and pooling, inside each shard.

    In the plain phase it is TorchRec's own. In a prepared phase the TBEs return unpooled rows, and each kernel's rows
    are quantized and pooled before output dist, so that what travels is pooled embeddings as ever. The quantizers
    (``mpe.dim_<D>.*``) are replicated: DistributedModelParallel's DDP broadcasts and averages them like the dense
    network. Rows start at the initial values of the phase, the same for any sharding.

    Args:
        module (MPEEmbeddingBagCollection): the unsharded collection.
        table_name_to_parameter_sharding, env, fused_params, device, kwargs: as ShardedEmbeddingBagCollection.

    Raises:
        ValueError: for a table that is both grid-sharded and mean-pooled, which TorchRec computes wrongly.
    """

    def __init__(
        self,
        module: MPEEmbeddingBagCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        for table in module.embedding_bag_configs():
            sharding_type = table_name_to_parameter_sharding[table.name].sharding_type
            if sharding_type == ShardingType.GRID_SHARD.value and table.pooling == PoolingType.MEAN:
                raise ValueError(
                    f"table {table.name} has mean pooling, which TorchRec computes wrongly under grid sharding; use "
                    "another sharding type for it"
                )
        super().__init__(module, table_name_to_parameter_sharding, env, fused_params, device, **kwargs)
        self.phase = module.phase
        self.row_initialization = module.row_initialization
        if self.phase is not Phase.PLAIN:
            self.mpe = module.mpe.to(device)
            self._check_same_on_all_ranks()
        if self.row_initialization is not None:
            self.reset_rows(self.row_initialization)

    @classmethod
    def create_grouped_sharding_infos(
        cls,
        module: MPEEmbeddingBagCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        prefix: str,
        fused_params: dict[str, Any] | None,
        suffix: str | None = "weight",
    ) -> dict[str, list[EmbeddingShardingInfo]]:
        """TorchRec's infos, in a prepared phase for TBEs that return unpooled rows of one width."""
        grouped: dict[str, list[EmbeddingShardingInfo]] = super().create_grouped_sharding_infos(
            module, table_name_to_parameter_sharding, prefix, fused_params, suffix
        )
        if module.phase is Phase.PLAIN:
            return grouped
        for info in (info for infos in grouped.values() for info in infos):
            info.embedding_config.pooling = PoolingType.NONE
            spec = info.param_sharding.sharding_spec
            columns = spec.shards[0].shard_sizes[1] if spec is not None else info.embedding_config.embedding_dim
            # FBGEMM refuses unpooled rows of different widths in one TBE.
            batch_key = f"mpe_dim_{info.embedding_config.embedding_dim}_columns_{columns}"
            info.fused_params = {**(info.fused_params or {}), "_batch_key": batch_key}
        return grouped

    def _create_lookups(self) -> None:
        super()._create_lookups()
        infos = [info for infos in self.sharding_type_to_sharding_infos.values() for info in infos]
        if all(info.embedding_config.pooling != PoolingType.NONE for info in infos):
            return
        for sharding, lookup in zip(self._embedding_shardings, self._lookups, strict=True):
            for kernel in lookup._emb_modules:
                kernel.forward = _QuantizedForward(self, lookup, kernel, isinstance(sharding, _ROWS_SPLIT))

    def pooling_of(self, table: str) -> PoolingType:
        """A table's pooling as the user configured it."""
        return self._table_name_to_config[table].pooling

    def embedding_bag_configs(self) -> list[Any]:
        """The table configs, as of the unsharded collection."""
        configs: list[Any] = self._embedding_bag_configs
        return configs

    def quantizers(self) -> dict[int, RowQuantizer]:
        """The replicated quantizers by embedding dimension; empty in the plain phase."""
        modules = self.mpe.values() if self.phase is not Phase.PLAIN else ()
        return {q.embedding_dim: q for q in modules if isinstance(q, RowQuantizer)}

    def kernels(self) -> Iterator[BaseBatchedEmbeddingBag]:
        """The embedding kernels that hold this rank's shards."""
        for lookup in self._lookups:
            yield from (lookup.module if isinstance(lookup, DistributedDataParallel) else lookup)._emb_modules

    def local_shards(self) -> Iterator[tuple[str, int, int, Tensor]]:
        """This rank's shards: table, first row, first column, and values [rows, columns] in the TBE's memory."""
        for kernel in self.kernels():
            for table, values in zip(kernel.config.embedding_tables, kernel.split_embedding_weights(), strict=True):
                row, column = _shard_offsets(table)
                yield table.name, row, column, values

    def reset_rows(self, initialization: RowInitialization) -> None:
        """Write every local row's initial value, and clear the fused optimizers' state."""
        with torch.no_grad():
            for table, row, column, values in self.local_shards():
                initialization.fill_(values, table, row, column)
            for kernel in self.kernels():
                _clear_fused_optimizer(kernel.emb_module)

    def reset_parameters(self) -> None:
        """TorchRec's initialization, or in a prepared phase that phase's initial rows; quantizers keep their values."""
        initialization = getattr(self, "row_initialization", None)
        if initialization is None:
            super().reset_parameters()
        else:
            self.reset_rows(initialization)

    def enter_retrain(self, quantizers: Mapping[int, RowQuantizer], initialization: RowInitialization) -> None:
        """Go from the search to the retrain phase in place; the TBEs and their sharding stay."""
        self.mpe = nn.ModuleDict({f"dim_{dim}": q for dim, q in quantizers.items()}).to(self._device)
        self.phase = Phase.RETRAIN
        self.row_initialization = initialization
        self._check_same_on_all_ranks()
        self.reset_rows(initialization)

    def _check_same_on_all_ranks(self) -> None:
        """Different counts or plans would not fail by themselves, only train nonsense."""
        group = self._env.process_group
        if group is None or dist.get_world_size(group) == 1:
            return
        mine = {dim: int(quantizer.layout_digest) for dim, quantizer in self.quantizers().items()}
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, mine, group=group)
        if any(other != mine for other in every):
            raise ValueError(
                "the ranks were prepared with different counts or plans: add up the counts of all ranks with "
                "FrequencyCounter.merge_across_ranks() before prepare_search_, and give every rank the same plan"
            )

    def compute_and_output_dist(self, ctx: EmbeddingBagCollectionContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """Lookup, quantize and pool, and output dist.

        Raises:
            NotImplementedError: in a prepared phase, for a batch of variable batch size per feature.
        """
        if self.phase is not Phase.PLAIN and ctx.variable_batch_per_feature:
            raise NotImplementedError(
                f"tables {', '.join(self._table_names)}: variable batch size per feature is not supported in the "
                "search and retrain phases; give every feature the same batch size"
            )
        awaitable = super().compute_and_output_dist(ctx, input)
        if self.phase is not Phase.PLAIN and torch.is_grad_enabled():
            awaitable.callbacks.append(self._touch_replicated)
        return awaitable

    def _touch_replicated(self, pooled: KeyedTensor) -> KeyedTensor:
        """Give every replicated parameter a zero gradient at least: DDP waits for it also on a rank without tables."""
        zero = sum((p.view(-1)[0] * 0 for p in self.mpe.parameters()), start=torch.zeros((), device=self._device))
        return KeyedTensor(
            keys=pooled.keys(),
            length_per_key=pooled.length_per_key(),
            values=pooled.values() + zero,
            key_dim=pooled.key_dim(),
        )

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Names that DDP must leave alone: all but the replicated quantizers."""
        replicated = append_prefix(prefix, "mpe.")
        for name in super().sharded_parameter_names(prefix):
            if not name.startswith(replicated):
                yield name

    @property
    def unsharded_module_type(self) -> type[MPEEmbeddingBagCollection]:
        return MPEEmbeddingBagCollection


def _clear_fused_optimizer(tbe: nn.Module) -> None:
    """Zero the optimizer state and iteration of a fused TBE; a dense TBE has neither."""
    if not isinstance(tbe, SplitTableBatchedEmbeddingBagsCodegen):
        return
    for states in tbe.split_optimizer_states():
        for state in states:
            state.zero_()
    tbe.reset_cache_states()  # without a flush: cached rows are those from before
    tbe.set_optimizer_step(0)
    if hasattr(tbe, "iter_cpu"):  # newer FBGEMM counts on the host as well
        tbe.iter_cpu.zero_()


class MPEEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """Shards MPEEmbeddingBagCollection; arguments as TorchRec's EmbeddingBagCollectionSharder.

    DistributedModelParallel finds sharders by the exact module type, so pass :func:`sharders` to it and to the planner.
    """

    def shard(
        self,
        module: MPEEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedMPEEmbeddingBagCollection:
        """The sharded collection of this rank."""
        return ShardedMPEEmbeddingBagCollection(
            module,
            params,
            env,
            self.fused_params,
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """TorchRec's, and on CPU also the row-wise ones, which it omits though they run there."""
        types: list[str] = super().sharding_types(compute_device_type)
        if compute_device_type == "cpu":
            types = list(dict.fromkeys([*types, ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value]))
        return types

    @property
    def module_type(self) -> type[MPEEmbeddingBagCollection]:
        return MPEEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedMPEEmbeddingBagCollection]:
        return ShardedMPEEmbeddingBagCollection


def sharders(fused_params: dict[str, Any] | None = None) -> list[ModuleSharder[nn.Module]]:
    """TorchRec's default sharders with ours for MPEEmbeddingBagCollection.

    Args:
        fused_params (Optional[Dict[str, Any]]): of the TBEs, for example
            ``{"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.02}``.
    """
    return [MPEEmbeddingBagCollectionSharder(fused_params=fused_params), *get_default_sharders()]
