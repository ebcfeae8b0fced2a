"""One shard for each kind of shard that an option has: row-wise tables have hundreds that are alike."""

import copy
from collections.abc import Callable

from torchrec.distributed.planner.types import Shard, ShardingOption
from torchrec.distributed.types import ShardingType


def distinct_shards(
    option: ShardingOption, apart: Callable[[Shard], int | None] | None = None
) -> tuple[ShardingOption, list[int]]:
    """A copy of an option with one shard of each kind, and for every shard of the option which of them it is like.

    Shards are alike if they have as many rows and columns, and either hold the first columns or not. Of data-parallel
    copies the first is of a kind of its own.

    Args:
        option (ShardingOption): whose shards TorchRec's estimators would each take the same time for.
        apart (Optional[Callable[[Shard], Optional[int]]]): a number that shards must have in common as well.
    """
    replicated = option.sharding_type == ShardingType.DATA_PARALLEL.value
    numbers: dict[tuple[int, int, bool, bool, int | None], int] = {}
    kinds: list[Shard] = []
    like: list[int] = []
    for position, shard in enumerate(option.shards):
        common = None if apart is None else apart(shard)
        key = (shard.size[0], shard.size[1], shard.offset[1] == 0, replicated and position > 0, common)
        if key not in numbers:
            numbers[key] = len(kinds)
            kinds.append(Shard(shard.size, shard.offset))
        like.append(numbers[key])
    reduced = copy.copy(option)
    reduced.shards = kinds
    return reduced, like
