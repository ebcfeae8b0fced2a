"""What the prefetch of a cached table's shard moves before a step."""

from dataclasses import dataclass

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.planner.types import Shard, ShardingOption

from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.distributed.planner.cache_load import CacheLoad
from torchrec_mpe.distributed.planner.cached_shard_bytes import store_bytes
from torchrec_mpe.distributed.planner.optimizer_state import state_bytes_per_row
from torchrec_mpe.ops.cache_tensors import WAYS

_FP32 = 4
# For each id: its number and its slot, int64, and the rows of its set's slots, int32.
_PROBE_BYTES = 2 * 8 + WAYS * 4


@dataclass(frozen=True)
class PrefetchTraffic:
    """Bytes that are read and written in a step.

    Attributes:
        store (float): in the backing store.
        slots (float): in slots and the directory.
    """

    store: float
    slots: float


def prefetch_traffic(
    option: ShardingOption, shard: Shard, config: CacheConfig, load: CacheLoad, optimizer: EmbOptimType
) -> PrefetchTraffic:
    """The traffic of one shard.

    A row that misses is read from the store and written to a slot, with its optimizer state. Once the cache is full
    another row leaves a slot for it, which training has changed: that one is read there and written to the store. So
    with M misses, stored rows of b bytes in the mean, and rows in slots of s bytes::

        store = 2 M b
        slots = 2 M s + 144 bytes an id, to find its slot

    Args:
        option (ShardingOption): one way of sharding the table.
        shard (Shard): one of its shards.
        config (CacheConfig): of the table.
        load (CacheLoad): of the shard.
        optimizer (EmbOptimType): fused.
    """
    rows, columns = shard.size
    if not rows:
        return PrefetchTraffic(0, 0)
    stored = store_bytes(option, shard, config, optimizer) / rows
    slot = columns * _FP32 + state_bytes_per_row(optimizer, columns, option.name)
    return PrefetchTraffic(2 * load.misses * stored, 2 * load.misses * slot + load.lookups * _PROBE_BYTES)
