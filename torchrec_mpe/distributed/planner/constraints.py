"""Which sharding types and compute kernels the planner may choose for a table."""

import copy
import logging
from collections.abc import Iterable, Mapping

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints, Topology
from torchrec.distributed.types import ModuleSharder, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from torchrec_mpe.distributed.planner.cache_load import CUSTOMIZED_KERNEL
from torchrec_mpe.modules.cached_embedding_bag_collection import CachedEmbeddingBagCollection
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection
from torchrec_mpe.upstream.feature_processed import collection_inside
from torchrec_mpe.upstream.planner import NARROWEST_COLUMN_SHARD

logger = logging.getLogger(__name__)

_TW, _RW, _CW, _TWRW, _TWCW, _GRID, _DP = (
    kind.value
    for kind in (
        ShardingType.TABLE_WISE,
        ShardingType.ROW_WISE,
        ShardingType.COLUMN_WISE,
        ShardingType.TABLE_ROW_WISE,
        ShardingType.TABLE_COLUMN_WISE,
        ShardingType.GRID_SHARD,
        ShardingType.DATA_PARALLEL,
    )
)
_DENSE, _FUSED = EmbeddingComputeKernel.DENSE.value, EmbeddingComputeKernel.FUSED.value
_UVM_CACHING = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
# Row-wise shards that a search space may have: estimating and copying one takes about 0.1 ms.
_MAX_ROW_WISE_SHARDS = 8_192
_MIN_ROW_WISE_TABLES = 8


def complete_constraints(
    module: nn.Module,
    sharders: Iterable[ModuleSharder[nn.Module]],
    topology: Topology,
    constraints: Mapping[str, ParameterConstraints] | None,
    *,
    offload: bool = False,
) -> dict[str, ParameterConstraints]:
    """The user's constraints, with what they leave open for tables of MPEEmbeddingBagCollections.

    - Compute kernels: FUSED, as TorchRec left alone chooses DENSE without a fused optimizer on CPU. A table that the
      user makes data-parallel gets DENSE, the only kernel there. A table with a CacheConfig gets CUSTOMIZED_KERNEL
      and is never data-parallel. With ``offload`` a table with cache_params may have FUSED_UVM_CACHING too.
    - Sharding types: table-wise, row-wise, table-row-wise where there are several hosts, and column-wise where TorchRec
      would cut the columns. Never grid sharding for mean pooling, which TorchRec computes wrongly.
    - Of these what the table's sharder allows; if it allows none, all that it does allow.
    - Pooling factors: one for each of the table's features. A single one is taken for all of them.

    Args:
        module (nn.Module): to be sharded.
        sharders (Iterable[ModuleSharder]): as for the planner.
        topology (Topology): devices.
        constraints (Optional[Mapping[str, ParameterConstraints]]): by table name; not changed.
        offload (bool): there is a proposer that moves tables between device and host memory.

    Returns:
        dict[str, ParameterConstraints]: by table name.

    Raises:
        ValueError: naming the collection, if it has no sharder; naming the table, if constraints leave it no sharding
            type and kernel, or have pooling factors, numbers of poolings or batch sizes for another number of features
            than it has.
    """
    by_type = {sharder.module_type: sharder for sharder in sharders}
    for name, collection in module.named_modules():
        if isinstance(collection, MPEEmbeddingBagCollection) and type(collection) not in by_type:
            raise ValueError(
                f"collection {name or 'of the model'} is a {type(collection).__name__}, for which there is no sharder: "
                "give torchrec_mpe.sharders() to the planner and to DistributedModelParallel"
            )
        inside = collection_inside(collection)
        if isinstance(inside, CachedEmbeddingBagCollection) and inside.cache_configs:
            raise ValueError(
                f"tables {', '.join(inside.cache_configs)} have a cache and are in {name or 'the model'}, a "
                f"{type(collection).__name__}, which TorchRec's planner gives no kernel with a cache: give them no "
                "CacheConfig, or look them up without feature processors"
            )
    given = dict(constraints or {})
    known: set[str] = set()
    for collection in module.modules():
        sharder = by_type.get(type(collection))
        if sharder is None:
            continue
        known |= set(sharder.shardable_parameters(collection))
        if not isinstance(collection, MPEEmbeddingBagCollection):
            continue
        for table in collection.embedding_bag_configs():
            cached = isinstance(collection, CachedEmbeddingBagCollection) and table.name in collection.cache_configs
            given[table.name] = _complete(table, given.get(table.name), sharder, topology, cached, offload)
    if unknown := sorted(set(constraints or {}) - known):
        logger.warning("constraints for %s: the model has no such table", ", ".join(unknown))
    return given


def _complete(
    table: EmbeddingBagConfig,
    constraint: ParameterConstraints | None,
    sharder: ModuleSharder[nn.Module],
    topology: Topology,
    cached: bool,
    offload: bool,
) -> ParameterConstraints:
    complete = ParameterConstraints() if constraint is None else copy.copy(constraint)
    device = topology.compute_device
    allowed = list(sharder.sharding_types(device))
    if cached and _DP in allowed:  # every rank would round its copy of the rows for itself
        allowed.remove(_DP)
    types, kernels = complete.sharding_types, complete.compute_kernels
    if not types:
        types = [_DP] if kernels == [_DENSE] else _default_types(table, complete.min_partition, topology)
        types = [kind for kind in types if kind in allowed] or list(allowed)
    if table.pooling == PoolingType.MEAN:
        if set(types) == {_GRID}:
            raise ValueError(
                f"table {table.name} has mean pooling, which TorchRec computes wrongly under grid sharding: constrain "
                "it to another sharding type"
            )
        types = [kind for kind in types if kind != _GRID]
    if not kernels:
        kernels = [CUSTOMIZED_KERNEL] if cached else [_FUSED, _DENSE] if _DP in types else [_FUSED]
        offered = {k for kind in types if kind in allowed for k in sharder.compute_kernels(kind, device)}
        if offload and not cached and complete.cache_params is not None and _UVM_CACHING in offered:
            kernels = [*kernels, _UVM_CACHING]
        elif not set(kernels) & offered:
            kernels = sorted(offered - {CUSTOMIZED_KERNEL}) or kernels
    if not cached and CUSTOMIZED_KERNEL in kernels:
        raise ValueError(
            f"table {table.name} is constrained to the compute kernel {CUSTOMIZED_KERNEL} but has no cache: give its "
            "CachedEmbeddingBagCollection a CacheConfig for it"
        )
    offers = {kind: list(sharder.compute_kernels(kind, device)) for kind in allowed}
    if not any(set(kernels) & set(offers.get(kind, ())) for kind in types):
        if constraint is None or not (constraint.sharding_types or constraint.compute_kernels):
            raise ValueError(
                f"table {table.name}: {type(sharder).__name__} allows no sharding type and compute kernel that go "
                f"together on {device}: {offers}"
            )
        if not any(kind in offers for kind in types) and not (cached and _DP in types):
            raise ValueError(
                f"table {table.name} is constrained to the sharding types {', '.join(types)}, of which "
                f"{type(sharder).__name__} allows none: {', '.join(allowed) or 'it allows no type'}"
            )
        raise ValueError(
            f"table {table.name} is constrained to the sharding types {', '.join(types)} and the compute kernels "
            f"{', '.join(kernels)}, which do not go together on {device}: "
            + (
                f"a table with a cache needs {CUSTOMIZED_KERNEL} and cannot be data_parallel"
                if cached
                else "data_parallel needs dense, the others fused or, on CUDA, a UVM kernel"
            )
        )
    types = [kind for kind in types if not (cached and kind == _DP)]
    complete.sharding_types, complete.compute_kernels = types, kernels
    for name in ("pooling_factors", "num_poolings", "batch_sizes"):
        values = getattr(complete, name)
        if values is not None and len(values) == 1:
            setattr(complete, name, values * table.num_features())
        elif values is not None and len(values) != table.num_features():
            raise ValueError(
                f"table {table.name} has {table.num_features()} features ({', '.join(table.feature_names)}), its "
                f"constraints {len(values)} {name}"
            )
    return complete


def as_the_user_constrained(
    complete: Mapping[str, ParameterConstraints], user_constraints: Mapping[str, ParameterConstraints] | None
) -> dict[str, ParameterConstraints]:
    """Complete constraints with the sharding types and compute kernels that the user gave, and no others."""
    given, nothing = dict(user_constraints or {}), ParameterConstraints()
    told = {name: copy.copy(constraint) for name, constraint in complete.items()}
    for name, constraint in told.items():
        user = given.get(name, nothing)
        constraint.sharding_types, constraint.compute_kernels = user.sharding_types, user.compute_kernels
    return told


def _default_types(table: EmbeddingBagConfig, min_partition: int | None, topology: Topology) -> list[str]:
    types = [_TW, _RW]
    several_hosts = 1 < topology.local_world_size < topology.world_size
    cuts_columns = (min_partition or NARROWEST_COLUMN_SHARD) < table.embedding_dim
    types += [_TWRW] * several_hosts + [_CW] * cuts_columns + [_TWCW] * (several_hosts and cuts_columns)
    return types


def without_needless_row_wise(
    module: nn.Module,
    topology: Topology,
    constraints: Mapping[str, ParameterConstraints],
    user_constraints: Mapping[str, ParameterConstraints] | None,
) -> dict[str, ParameterConstraints]:
    """Constraints that offer row-wise sharding to the largest tables only, where the search space would be huge.

    A row-wise option has one shard a device, so 500 tables on 512 devices would make 256,000. Kept are the tables with
    the largest share of rows or of lookups, as many as make 8,192 shards, and all that fill more than half of a
    device. What the user constrained stays.

    Args:
        module, topology: as in :func:`complete_constraints`.
        constraints (Mapping[str, ParameterConstraints]): complete.
        user_constraints (Optional[Mapping[str, ParameterConstraints]]): as given.
    """
    tables = [
        table
        for collection in module.modules()
        if isinstance(collection, MPEEmbeddingBagCollection)
        for table in collection.embedding_bag_configs()
    ]
    keep = max(_MAX_ROW_WISE_SHARDS // topology.world_size, _MIN_ROW_WISE_TABLES)
    if len(tables) <= keep:
        return dict(constraints)
    elements = {t.name: t.num_embeddings * t.embedding_dim for t in tables}
    lookups = {t.name: sum(constraints[t.name].pooling_factors) * t.embedding_dim for t in tables}
    all_elements, all_lookups = sum(elements.values()), sum(lookups.values())
    share = {t.name: max(elements[t.name] / all_elements, lookups[t.name] / all_lookups) for t in tables}
    largest = set(sorted(share, key=share.__getitem__, reverse=True)[:keep])
    device = topology.devices[0].storage
    half = (device.ddr if topology.compute_device == "cpu" else device.hbm) / 2
    chosen = dict(constraints)
    for table in tables:
        user = (user_constraints or {}).get(table.name)
        too_large = elements[table.name] * 4 > half
        if table.name in largest or too_large or (user is not None and user.sharding_types):
            continue
        offered = [kind for kind in constraints[table.name].sharding_types if kind != _RW]
        chosen[table.name] = copy.copy(constraints[table.name])
        chosen[table.name].sharding_types = offered
    return chosen
