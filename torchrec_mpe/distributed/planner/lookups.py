"""How many ids of a batch a shard looks up, and how many distinct rows that can be."""

import math
from collections.abc import Mapping

from torchrec.distributed.planner.types import ParameterConstraints, Shard, ShardingOption
from torchrec.distributed.types import ShardingType

from torchrec_mpe.upstream.planner import poolings_per_feature


def lookups_per_feature(
    option: ShardingOption,
    shard: Shard,
    constraints: Mapping[str, ParameterConstraints] | None,
    world_size: int,
) -> list[float]:
    """The ids that each of the table's features looks up in one shard, in one step.

    ``batch size * number of poolings * pooling factor`` ids of every rank, or of this rank alone if the table is
    data-parallel; of those the shard's part of the rows, as if all rows were equally frequent. TorchRec's estimators
    assume the same.

    Args:
        option (ShardingOption): one way of sharding the table.
        shard (Shard): one of its shards.
        constraints (Optional[Mapping[str, ParameterConstraints]]): by table, for batch sizes and numbers of poolings
            per feature; pooling factors are the option's.
        world_size (int): ranks.
    """
    constraint = constraints.get(option.name) if constraints else None
    batch_sizes = (constraint and constraint.batch_sizes) or [option.batch_size] * option.num_inputs
    poolings = poolings_per_feature(option, constraints)
    share = world_size * shard.size[0] / option.tensor.shape[0]
    if option.sharding_type == ShardingType.DATA_PARALLEL.value:
        share = 1
    return [
        share * batch * pooling * length
        for batch, pooling, length in zip(batch_sizes, poolings, option.input_lengths, strict=True)
    ]


def distinct_rows(lookups: float, rows: int) -> float:
    """How many of ``rows`` rows ``lookups`` independent lookups touch, in the mean, if all are equally frequent.

    ``rows * (1 - (1 - 1/rows) ** lookups)``; of rows that differ in frequency they touch fewer.
    """
    if rows <= 1:
        return min(lookups, float(rows))
    return -rows * math.expm1(lookups * math.log1p(-1 / rows))
