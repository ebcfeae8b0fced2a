"""MPEEmbeddingBagCollection sharded by TorchRec, its rows in FBGEMM's training TBE."""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag
from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, KJTList
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.distributed.types import LazyAwaitable, ParameterSharding, ShardingEnv, ShardingType
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_mpe.distributed.local_counts import LocalCounts
from torchrec_mpe.distributed.quantized_forward import MergeVariableBatches, QuantizedForward, shard_offsets
from torchrec_mpe.distributed.row_shard import RowShard, TensorShard
from torchrec_mpe.distributed.sharded_ranks import ShardedRanks
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.modules.row_quantizer import RowQuantizer
from torchrec_mpe.precision.row_initialization import RowInitialization

# Kernels whose rows can be had unpooled, in the order of preference on a GPU.
QUANTIZED_KERNELS = tuple(
    kernel.value
    for kernel in (
        EmbeddingComputeKernel.FUSED,
        EmbeddingComputeKernel.FUSED_UVM_CACHING,
        EmbeddingComputeKernel.FUSED_UVM,
        EmbeddingComputeKernel.DENSE,
    )
)
_ROWS_SPLIT = (RwPooledEmbeddingSharding, TwRwPooledEmbeddingSharding, GridPooledEmbeddingSharding)


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
        ValueError: for a table that is both grid-sharded and mean-pooled, which TorchRec computes wrongly;
            data-parallel with a fused kernel, which FBGEMM cannot keep equal on all ranks; mean-pooled in a weighted
            collection; or in a prepared phase of a compute kernel without unpooled rows.
    """

    quantized_kernels = QUANTIZED_KERNELS

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
            sharding = table_name_to_parameter_sharding[table.name]
            _refuse_wrong_sharding(module, table, sharding, self.quantized_kernels)
        super().__init__(module, table_name_to_parameter_sharding, env, fused_params, device, **kwargs)
        self._counts: LocalCounts | None = None
        self._divide_by_length = self._columns_to_divide()
        self.phase = module.phase
        self.row_initialization = module.row_initialization
        if self.phase is not Phase.PLAIN:
            self._shard_row_maps(module.quantizers())
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
        self._lookups += [self._create_lookup(sharding) for sharding in self._embedding_shardings]
        self._quantized: list[QuantizedForward] = []
        infos = [info for infos in self.sharding_type_to_sharding_infos.values() for info in infos]
        prepared = any(info.embedding_config.pooling == PoolingType.NONE for info in infos)
        for sharding, lookup in zip(self._embedding_shardings, self._lookups, strict=True):
            if prepared or self._device.type == "cpu":
                lookup._forward_with_vbe_merging = MergeVariableBatches(lookup)
            if prepared:
                lookup.register_forward_hook(self._touch_replicated)
                # Mean pooling over rows of several ranks is a division after output dist, TorchRec's own.
                mean = self._never if isinstance(sharding, _ROWS_SPLIT) else self._is_mean
                for kernel in lookup._emb_modules:
                    kernel.forward = QuantizedForward(kernel, lookup, self.quantizers, mean)
                    self._quantized.append(kernel.forward)

    def _create_lookup(self, sharding: Any) -> nn.Module:
        """The lookup of the tables of one sharding type."""
        lookup: nn.Module = sharding.create_lookup()
        return lookup

    def _is_mean(self, table: str) -> bool:
        return bool(self.pooling_of(table) == PoolingType.MEAN)

    def _never(self, table: str) -> bool:
        return False

    def _shard_row_maps(self, quantizers: Mapping[int, RowQuantizer]) -> None:
        """Keep of what each row belongs to, and of its frequency rank, what this rank's own rows need."""
        self.mpe = nn.ModuleDict({f"dim_{dim}": copy.copy(quantizer) for dim, quantizer in quantizers.items()})
        self.mpe.to(self._device)
        for forward in self._quantized:
            forward.set_row_map(self._device)
        shards = [table for kernel in self.kernels() for table in kernel.config.embedding_tables]
        once = [
            (shard.name, shard_offsets(shard)[0], shard.local_rows) for shard in shards if not shard_offsets(shard)[1]
        ]
        if dist.get_rank(self.process_group) > 0:
            once = [shard for shard in once if shard[0] not in self.data_parallel_tables()]
        for quantizer in self.quantizers().values():
            own = [shard for shard in once if shard[0] in quantizer.num_embeddings]
            quantizer.replace_ranks(partial(ShardedRanks, shards=own, group=self.process_group, device=self._device))

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that the tables are sharded over."""
        group: dist.ProcessGroup | None = self._env.process_group
        return group

    @property
    def device(self) -> torch.device:
        """Where this rank's shards are looked up."""
        device: torch.device = self._device
        return device

    def data_parallel_tables(self) -> set[str]:
        """The tables that every rank has a copy of."""
        return {
            table
            for table, sharding in self.module_sharding_plan.items()
            if sharding.sharding_type == ShardingType.DATA_PARALLEL.value
        }

    def start_counting(self) -> None:
        """Count the lookups of this rank's rows from now on: see :func:`torchrec_mpe.track_frequencies_`."""
        tables = [
            [table for kernel in _kernels_of(lookup) for table in kernel.config.embedding_tables]
            for lookup in self._lookups
        ]
        self._counts = LocalCounts(tables, self._device)

    def local_counts(self) -> Iterator[tuple[str, int, Tensor]]:
        """Table, first row and counts, int64 [rows], of this rank's shards; nothing if they are not counted."""
        if self._counts is not None:
            yield from self._counts.shards()

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
            yield from _kernels_of(lookup)

    def local_shards(self) -> Iterator[tuple[str, int, int, Tensor]]:
        """This rank's shards: table, first row, first column, and values [rows, columns] in the TBE's memory."""
        for kernel in self.kernels():
            for table, values in zip(kernel.config.embedding_tables, kernel.split_embedding_weights(), strict=True):
                row, column = shard_offsets(table)
                yield table.name, row, column, values

    def shards(self) -> Iterator[RowShard]:
        """This rank's shards, to read rows from wherever they are."""
        for shard in self.local_shards():
            yield TensorShard(*shard)

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
        self.phase = Phase.RETRAIN
        self.row_initialization = initialization
        self._shard_row_maps(quantizers)
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

    def input_dist(self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor) -> Any:
        """TorchRec's, but only mean-pooled tables whose rows are split over ranks are divided by bag lengths.

        TorchRec 1.8 prepares to divide all columns of a collection with such a table, those of other sharding types too
        and those of a sum-pooled table that reads the same feature.
        """
        awaitable = super().input_dist(ctx, features)
        if ctx.divisor is not None:
            ctx.divisor = torch.where(self._divide_by_length, ctx.divisor, 1)
        return awaitable

    def _columns_to_divide(self) -> Tensor:
        """Which columns of the output are of mean-pooled tables that are sharded by rows, bool [sum of dims]."""
        # TorchRec would put 1 for the lengths of these features, also where a mean-pooled table reads them.
        self._pooling_type_to_rs_features[PoolingType.SUM.value] = []
        divided = {
            name
            for kind in (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
            for info in self.sharding_type_to_sharding_infos.get(kind, [])
            if self._is_mean(info.embedding_config.name)
            for name in info.embedding_config.embedding_names
        }
        columns = [
            torch.full((d,), n in divided) for n, d in zip(self._embedding_names, self._embedding_dims, strict=True)
        ]
        return torch.cat(columns).to(self._device)

    def compute_and_output_dist(self, ctx: EmbeddingBagCollectionContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """Lookup, quantize and pool, and output dist.

        Raises:
            NotImplementedError: for variable batches, where TorchRec puts several dense kernels together wrongly.
        """
        if ctx.variable_batch_per_feature:
            self._refuse_variable_batches_of_dense_kernels()
        if self._counts is not None and self.training:
            self._counts.update(input)
        return super().compute_and_output_dist(ctx, input)

    def _refuse_variable_batches_of_dense_kernels(self) -> None:
        """Decided from the kernels of all ranks: if only some raised, the others would wait for them."""
        for sharding_type, sharding in zip(self._sharding_types, self._embedding_shardings, strict=True):
            if sharding_type == ShardingType.DATA_PARALLEL.value:
                continue
            for kernels in sharding._grouped_embedding_configs_per_rank:
                dense = [kernel for kernel in kernels if kernel.compute_kernel == EmbeddingComputeKernel.DENSE]
                if dense and len(kernels) > 1:
                    tables = [table.name for kernel in kernels for table in kernel.embedding_tables]
                    raise NotImplementedError(
                        f"tables {', '.join(tables)} are sharded {sharding_type} with several dense kernels, whose "
                        "variable batches TorchRec puts together in the wrong order; use the compute kernel fused for "
                        "them"
                    )

    def _touch_replicated(self, lookup: nn.Module, features: Any, pooled: Tensor) -> Tensor:
        """Let every replicated parameter's gradient wait for that of every lookup, also where it has no part in it.

        DDP averages a parameter's gradient as soon as it is complete. If that came before output dist's backward on a
        rank without tables and after it on another, the two would issue their collectives in different orders and hang.
        """
        if self.phase is Phase.PLAIN or not torch.is_grad_enabled():
            return pooled
        touched: Tensor = _ZeroGradients.apply(pooled, *self.mpe.parameters())  # type: ignore[no-untyped-call]
        return touched

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Names that DDP must leave alone: all but the replicated quantizers."""
        replicated = append_prefix(prefix, "mpe.")
        for name in super().sharded_parameter_names(prefix):
            if not name.startswith(replicated):
                yield name

    @property
    def unsharded_module_type(self) -> type[MPEEmbeddingBagCollection]:
        return MPEEmbeddingBagCollection


def _kernels_of(lookup: Any) -> Iterator[BaseBatchedEmbeddingBag]:
    yield from (lookup.module if isinstance(lookup, DistributedDataParallel) else lookup)._emb_modules


class _ZeroGradients(torch.autograd.Function):
    """Its first argument; the others get a gradient of zeros once the first has one."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return pooled.view_as(pooled)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros_like(p) for p in ctx.saved_tensors)


def _refuse_wrong_sharding(
    module: MPEEmbeddingBagCollection, table: Any, sharding: ParameterSharding, quantized: tuple[str, ...]
) -> None:
    if sharding.sharding_type == ShardingType.GRID_SHARD.value and table.pooling == PoolingType.MEAN:
        raise ValueError(
            f"table {table.name} has mean pooling, which TorchRec computes wrongly under grid sharding; use another "
            "sharding type for it"
        )
    if module.is_weighted() and table.pooling == PoolingType.MEAN:
        raise ValueError(
            f"table {table.name} has mean pooling in a weighted collection: TorchRec divides by the count or by the "
            "weights' sum depending on the sharding; use sum pooling with weights already divided"
        )
    if module.phase is not Phase.PLAIN and sharding.compute_kernel not in quantized:
        raise ValueError(
            f"table {table.name} has the compute kernel {sharding.compute_kernel}, which gives no unpooled rows to "
            f"quantize; use {', '.join(quantized[:-1])} or {quantized[-1]}"
        )
    data_parallel = sharding.sharding_type == ShardingType.DATA_PARALLEL.value
    if data_parallel and sharding.compute_kernel != EmbeddingComputeKernel.DENSE.value:
        raise ValueError(
            f"table {table.name} is data-parallel with the compute kernel {sharding.compute_kernel}, whose row updates "
            "the ranks would not share; use the kernel dense for it, or another sharding type"
        )


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

    DistributedModelParallel finds sharders by the exact module type, so pass :func:`torchrec_mpe.sharders` to it and to
    the planner.
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
        return self.sharded_module_type(
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
            omitted = (ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD)
            types = list(dict.fromkeys([*types, *(kind.value for kind in omitted)]))
        return types

    @property
    def module_type(self) -> type[MPEEmbeddingBagCollection]:
        return MPEEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedMPEEmbeddingBagCollection]:
        return ShardedMPEEmbeddingBagCollection
