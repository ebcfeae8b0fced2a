"""Packed collections in TorchRec's quantized-inference flow."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    ModuleSharder,
    ParameterSharding,
    ShardingEnv,
    ShardingType,
)

from torchrec_mpe.distributed.planner.packed_placement import PackedShard
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.inference.sharded.sharded_collection import ShardedPackedEmbeddingBagCollection
from torchrec_mpe.inference.sharded.verify import verify_sharded

_SHARDING_TYPES = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]


class PackedEmbeddingBagCollectionSharder(ModuleSharder[PackedEmbeddingBagCollection]):
    """Shards packed collections in ``shard_quant_model`` and ``_shard_modules``, over the devices of one process.

    Rows are copied to the devices that the plan names, whatever ``sharding_device`` says, TorchRec's default "meta"
    included; then the values are verified. To TorchRec's planner a table is uint8, with as many columns as a row takes
    bytes on average, directory, scales and padding included; so are the shard sizes of its plans. It splits rows
    evenly. For the fewest devices and exact bytes plan with :meth:`MPEShardingPlanner.replan` or use
    :func:`shard_packed`.

    Example::

        sharders = [*sharders_of_the_rest, PackedEmbeddingBagCollectionSharder()]
        sharded, plan = shard_quant_model(model, world_size=2, compute_device="cuda", sharders=sharders)
        traced = torch.fx.GraphModule(sharded, Tracer(leaf_modules=LEAF_MODULES).trace(sharded))
        torch.jit.script(traced).save("model.pt")
    """

    @torch.no_grad()
    def shard(
        self,
        module: PackedEmbeddingBagCollection,
        params: Mapping[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedPackedEmbeddingBagCollection:
        """Shard a packed collection and verify its values.

        Args:
            module (PackedEmbeddingBagCollection): with the "packed" backend, its tables on the CPU or a GPU.
            params (Mapping[str, ParameterSharding]): of every table, TABLE_WISE or ROW_WISE with a sharding spec; or
                DATA_PARALLEL for a table of which this replica holds all.
            env (ShardingEnv): ``ShardingEnv.from_local(world_size, 0)``, whose rank the pooled embeddings go to.
            device (Optional[torch.device]): where DATA_PARALLEL tables go if no other table says; unless "meta".
            module_fqn (Optional[str]): path of the module, for errors.

        Raises:
            NotImplementedError: if the environment has a process group.
            RuntimeError: naming table and feature, if sharded and unsharded values differ.
            ValueError: naming the table, if the plan lacks it, splits its columns, or its values are on "meta".
        """
        where = module_fqn or type(module).__name__
        if getattr(env, "process_group", None) is not None:
            raise NotImplementedError(
                f"{where}: packed tables are sharded over the devices of one process, not over a process group: take "
                "ShardingEnv.from_local"
            )
        if module.device.type == "meta":
            raise ValueError(f"{where}: the packed tables are on the meta device and have no values: load them first")
        shards: list[PackedShard] = []
        devices: dict[int, torch.device] = {}
        for config in module.embedding_bag_configs():
            if config.name not in params:
                raise ValueError(f"{where}: the sharding plan has no table {config.name}")
            shape = config.name, config.num_embeddings, config.embedding_dim
            shards += _shards(*shape, params[config.name], env, devices)
        home = device if device is not None and device.type != "meta" else module.device
        kind = next(iter(devices.values()), home).type
        by_rank = [
            devices.get(rank, torch.device(kind, rank) if kind == "cuda" else torch.device(kind))
            for rank in range(env.world_size)
        ]
        sharded = ShardedPackedEmbeddingBagCollection(module, shards, by_rank, by_rank[env.rank])
        verify_sharded(sharded, module)
        return sharded

    def shardable_parameters(self, module: PackedEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        """A uint8 tensor on the meta device for each table, [rows, bytes of a row on average rounded up]."""
        return {
            table.name: nn.Parameter(_like(table.num_embeddings, -(-table.total // table.num_embeddings)), False)
            for table in module.size_report().tables
        }

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """TABLE_WISE and ROW_WISE."""
        return list(_SHARDING_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """QUANT."""
        return [EmbeddingComputeKernel.QUANT.value]

    @property
    def module_type(self) -> type[PackedEmbeddingBagCollection]:
        """PackedEmbeddingBagCollection."""
        return PackedEmbeddingBagCollection


def _like(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.uint8, device="meta")


def _shards(
    table: str,
    rows: int,
    dim: int,
    sharding: ParameterSharding,
    env: ShardingEnv,
    devices: dict[int, torch.device],
) -> list[PackedShard]:
    """The shards of a table; adds the devices of their ranks."""
    if sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
        return [PackedShard(table, env.rank, 0, rows, dim, 0)]
    spec = sharding.sharding_spec
    if sharding.sharding_type not in _SHARDING_TYPES or not isinstance(spec, EnumerableShardingSpec):
        raise ValueError(
            f"table {table}: packed tables are sharded {' or '.join(_SHARDING_TYPES)} with a sharding spec, "
            f"not {sharding.sharding_type}"
        )
    shards: list[PackedShard] = []
    for shard in spec.shards:
        if shard.shard_offsets[1] != 0:
            raise ValueError(f"table {table}: the columns of packed rows cannot be split, the sharding spec does")
        rank = None if shard.placement is None else shard.placement.rank()
        if shard.placement is None or rank is None:
            raise ValueError(f"table {table}: its sharding spec names no ranks")
        if shard.shard_sizes[0]:  # an even split leaves the last ranks without rows of a small table
            devices[rank] = shard.placement.device()
            shards.append(PackedShard(table, rank, shard.shard_offsets[0], shard.shard_sizes[0], dim, 0))
    return shards
