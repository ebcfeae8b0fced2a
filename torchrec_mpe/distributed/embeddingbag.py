"""MPEEmbeddingBagCollection sharded by TorchRec, its rows in FBGEMM's training TBE."""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, KJTList
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext, EmbeddingBagCollectionSharder
from torchrec.distributed.types import LazyAwaitable, ParameterSharding, ShardingEnv, ShardingType
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_mpe.distributed.local_counts import LocalCounts
from torchrec_mpe.distributed.pooled_lookup import MPEPooledLookup
from torchrec_mpe.distributed.row_shard import RowShard, TensorShard, shard_offsets
from torchrec_mpe.distributed.sharded_order import ShardedOrder
from torchrec_mpe.modules.check_ids import check_ids, rows_of_features
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.modules.row_quantizer import RowQuantizer
from torchrec_mpe.precision.row_initialization import RowInitialization
from torchrec_mpe.upstream.fused_optimizers import refusal_of_weight_decay
from torchrec_mpe.upstream.optimizers import without_optimizers_in_backward_
from torchrec_mpe.upstream.pooled_lookup import EmbeddingKernel
from torchrec_mpe.upstream.sharded_embeddingbag import OpenShardedEmbeddingBagCollection
from torchrec_mpe.upstream.tbe import BoundsCheckMode, SplitTableBatchedEmbeddingBagsCodegen, set_steps

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
_ROWS_SPLIT = tuple(
    kind.value for kind in (ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD)
)


class ShardedMPEEmbeddingBagCollection(OpenShardedEmbeddingBagCollection):
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
        # FBGEMM's own default is WARNING, which trains row 0 in place of what is no row.
        fused_params = {"bounds_check_mode": BoundsCheckMode.FATAL, **(fused_params or {})}
        super().__init__(module, table_name_to_parameter_sharding, env, fused_params, device, **kwargs)
        modes = {
            table: sharding.bounds_check_mode or fused_params["bounds_check_mode"]
            for table, sharding in table_name_to_parameter_sharding.items()
        }
        self._rows_of_features = rows_of_features(module.embedding_bag_configs(), modes)
        self._counts: LocalCounts | None = None
        self.phase = module.phase
        self.row_initialization = module.row_initialization
        if self.phase is not Phase.PLAIN:
            for quantizer in module.quantizers().values():
                # Given for the collection's rows, after it was prepared: quantizers are trained with the dense network.
                without_optimizers_in_backward_(quantizer)
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
        for info in (info for infos in grouped.values() for info in infos):
            _refuse_wrong_decay(info, module)
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

    def create_lookup(self, sharding_type: str, sharding: Any, **cached: Any) -> MPEPooledLookup:
        """The lookup of all tables of one sharding type; ``cached`` as the last arguments of MPEPooledLookup."""
        # Mean pooling over rows of several ranks is a division after output dist, TorchRec's own.
        tables = [] if sharding_type in _ROWS_SPLIT else self.embedding_bag_configs()
        mean_tables = {table.name for table in tables if table.pooling == PoolingType.MEAN}
        return MPEPooledLookup(sharding, mean_tables, **cached)

    def _shard_row_maps(self, quantizers: Mapping[int, RowQuantizer]) -> None:
        """Keep of what each row belongs to, and of its place in the frequency order, what this rank's own rows need."""
        self.mpe = nn.ModuleDict({f"dim_{dim}": copy.copy(quantizer) for dim, quantizer in quantizers.items()})
        self.mpe.to(self.device)
        for lookup in self.lookups():
            lookup.quantize_with(self.quantizers(), self.device)
        shards = [table for kernel in self.kernels() for table in kernel.config.embedding_tables]
        once = [
            (shard.name, shard_offsets(shard)[0], shard.local_rows) for shard in shards if not shard_offsets(shard)[1]
        ]
        if dist.get_rank(self.process_group) > 0:
            once = [shard for shard in once if shard[0] not in self.data_parallel_tables()]
        for quantizer in self.quantizers().values():
            own = [shard for shard in once if shard[0] in quantizer.num_embeddings]
            quantizer.replace_order(partial(ShardedOrder, shards=own, group=self.process_group, device=self.device))

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
            [table for kernel in lookup.kernels for table in kernel.config.embedding_tables]
            for lookup in self.lookups()
        ]
        self._counts = LocalCounts(tables, self.device, weighted=self.is_weighted())

    def local_counts(self) -> Iterator[tuple[str, int, Tensor]]:
        """Table, first row and counts, int64 [rows], of this rank's shards; nothing if they are not counted."""
        if self._counts is not None:
            yield from self._counts.shards()

    def local_squared_weights(self) -> Iterator[tuple[str, int, Tensor]]:
        """As :meth:`local_counts`, the sums of squared weights, float64 [rows]; nothing where bags have none."""
        if self._counts is not None:
            yield from self._counts.squared_shards()

    def quantizers(self) -> dict[int, RowQuantizer]:
        """The replicated quantizers by embedding dimension; empty in the plain phase."""
        modules = self.mpe.values() if self.phase is not Phase.PLAIN else ()
        return {q.embedding_dim: q for q in modules if isinstance(q, RowQuantizer)}

    def kernels(self) -> Iterator[EmbeddingKernel]:
        """The embedding kernels that hold this rank's shards."""
        for lookup in self.lookups():
            yield from lookup.kernels

    def row_maps(self) -> list[Tensor]:
        """What each of this rank's rows belongs to, one map a kernel; none in the plain phase."""
        return [row_map for lookup in self.lookups() for row_map in lookup.row_maps()]

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
        group = self.process_group
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
        """TorchRec's, once ids are known to be rows of their tables.

        Raises:
            IndexError: naming table and feature, for an id that is none, unless the TBEs' ``bounds_check_mode`` is
                another than FATAL: :func:`torchrec_mpe.modules.check_ids.check_ids`.
        """
        if isinstance(features, KeyedJaggedTensor):
            features = check_ids(features, self._rows_of_features)
        return super().input_dist(ctx, features)

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
        for sharding_type, groups_of_ranks in self.kernel_configs():
            for groups in groups_of_ranks:
                dense = [group for group in groups if group.compute_kernel == EmbeddingComputeKernel.DENSE]
                if dense and len(groups) > 1:
                    tables = [table.name for group in groups for table in group.embedding_tables]
                    raise NotImplementedError(
                        f"tables {', '.join(tables)} are sharded {sharding_type} with several dense kernels, whose "
                        "variable batches TorchRec puts together in the wrong order; use the compute kernel fused for "
                        "them"
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


def _refuse_wrong_decay(info: EmbeddingShardingInfo, module: MPEEmbeddingBagCollection) -> None:
    """Of a table that a fused optimizer trains."""
    if info.param_sharding.compute_kernel == EmbeddingComputeKernel.DENSE.value:
        return
    config = info.embedding_config
    on_cpu = all(shard.placement.device().type == "cpu" for shard in info.param_sharding.sharding_spec.shards)
    alone = on_cpu and module.phase is Phase.PLAIN and len(config.feature_names) == 1
    said = refusal_of_weight_decay(info.fused_params or {}, pooled_on_cpu=alone)
    if said is not None:
        raise ValueError(f"table {config.name}: {said}")


def _clear_fused_optimizer(tbe: nn.Module) -> None:
    """Zero the optimizer state and iteration of a fused TBE; a dense TBE has neither."""
    if not isinstance(tbe, SplitTableBatchedEmbeddingBagsCodegen):
        return
    for states in tbe.split_optimizer_states():
        for state in states:
            state.zero_()
    tbe.reset_cache_states()  # without a flush: cached rows are those from before
    set_steps(tbe, 0)


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
            types = list(dict.fromkeys([*types, *_ROWS_SPLIT]))
        return types

    @property
    def module_type(self) -> type[MPEEmbeddingBagCollection]:
        return MPEEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedMPEEmbeddingBagCollection]:
        return ShardedMPEEmbeddingBagCollection
