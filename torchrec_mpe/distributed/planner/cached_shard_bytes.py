"""The memory of one shard of a cached table: its backing store, its cache, and the cache's directory."""

import weakref
from collections.abc import Mapping
from dataclasses import replace

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torchrec.distributed.planner.types import ParameterConstraints, Shard, ShardingOption
from torchrec.distributed.types import PipelineType

from torchrec_mpe.cache.config import SPILL_GROWTH, CacheConfig
from torchrec_mpe.distributed.planner.cache_load import cache_load
from torchrec_mpe.distributed.planner.optimizer_state import state_elements
from torchrec_mpe.distributed.planner.packed_rows import rows_per_segment
from torchrec_mpe.distributed.planner.shard_bytes import ShardBytes
from torchrec_mpe.modules.cached_embedding_bag_collection import CachedEmbeddingBagCollection
from torchrec_mpe.ops.cache_tensors import WAYS, StoredRow, empty_directory

_FP32 = 4
_BATCH_NUMBER_BYTES = 8  # of the last batch, int64
_SLOT_NUMBER_BYTES = 8  # of an id, int64
# A bitmap's word and the 8-bit rows before it, of 64 rows of which some have 4 bits and some 8.
_WIDTH_ROWS, _WIDTH_BYTES = 64, 8 + 4

# Counted once: of ids that are no frequency ranks that reads every rank.
_wide_rows: "weakref.WeakKeyDictionary[CachedEmbeddingBagCollection, dict[tuple[str, int, int], int]]" = (
    weakref.WeakKeyDictionary()
)


def bytes_of_cached_shard(
    option: ShardingOption,
    shard: Shard,
    config: CacheConfig,
    fused: ShardBytes,
    optimizer: EmbOptimType,
    constraints: Mapping[str, ParameterConstraints] | None,
    world_size: int,
    compute_device: str,
    pipeline_type: PipelineType = PipelineType.NONE,
) -> ShardBytes:
    """The memory of one shard.

    With R rows, at least one, and D columns, C cache slots and S spill slots:

    - ``store``: R rows of :class:`StoredRow`'s bytes and, where a precision plan mixes widths, 12 bytes for every 64;
    - ``cache``: 4 D C; ``spill``: 4 D S;
    - ``optimizer_state``: that of C + S float32 rows;
    - ``directory``: 9 (C + S), a few counters and, with LFU, C + S + R more;
    - ``inputs_outputs``: those of the fused kernel, and 8 bytes for the slot of every id of a batch in flight.

    All is exact but S, which is 1.25 times what :func:`cache_load` expects, as the spill area grows to 1.25 times what
    a batch needs, or ``CacheConfig.spill_rows`` if that is more. While it grows, which it does in the first batches if
    ``spill_rows`` is too small, there are two copies of cache, spill and their state: that is not counted.

    Args:
        option (ShardingOption): with the compute kernel ``customized_kernel``.
        shard (Shard): one of its shards.
        config (CacheConfig): of the table.
        fused (ShardBytes): what the shard would take with all rows in float32, as a fused kernel has them.
        optimizer (EmbOptimType): fused.
        constraints (Optional[Mapping[str, ParameterConstraints]]): by table.
        world_size (int): ranks.
        compute_device (str): "cpu" or "cuda".
        pipeline_type (PipelineType): with TRAIN_PREFETCH_SPARSE_DIST two batches are in flight.

    Raises:
        ValueError: for an optimizer whose state is not known, naming the table.
    """
    rows, columns = max(shard.size[0], 1), shard.size[1]
    in_flight = 2 if pipeline_type == PipelineType.TRAIN_PREFETCH_SPARSE_DIST else 1
    load = cache_load(option, shard, config, constraints, world_size, in_flight)
    cache = WAYS * config.num_sets(rows)
    spill = max(config.spill_rows, round(SPILL_GROWTH * load.spilled_rows))
    states = state_elements(optimizer, columns, option.name)
    lfu = config.algorithm == CacheAlgorithm.LFU
    directory = empty_directory(rows, config.num_sets(rows), spill, lfu=lfu, device="meta")
    return replace(
        fused,
        rows=0,
        store=store_bytes(option, shard, config, optimizer),
        cache=cache * columns * _FP32,
        spill=spill * columns * _FP32,
        optimizer_state=(cache + spill) * sum(states) * _FP32,
        directory=sum(tensor.nbytes for tensor in directory) + _BATCH_NUMBER_BYTES,
        inputs_outputs=fused.inputs_outputs + round(in_flight * load.lookups * _SLOT_NUMBER_BYTES),
        store_on_host=config.location == "host" and compute_device != "cpu",
    )


def store_bytes(option: ShardingOption, shard: Shard, config: CacheConfig, optimizer: EmbOptimType) -> int:
    """Bytes of a shard's backing store, exact; arguments as :func:`bytes_of_cached_shard`."""
    rows: int = max(shard.size[0], 1)
    columns: int = shard.size[1]
    states = tuple((n, config.state_dtype(optimizer, n)) for n in state_elements(optimizer, columns, option.name))
    row4, row8 = (StoredRow(bits, columns, states).bytes for bits in (4, 8))
    wide = wide_rows_of_shard(option, shard)
    if wide is None:
        return rows * (row4 if config.bits == 4 else row8)
    widths = -(-rows // _WIDTH_ROWS) * _WIDTH_BYTES if 0 < wide < rows else 0
    return (rows - wide) * row4 + wide * row8 + widths


def wide_rows_of_shard(option: ShardingOption, shard: Shard) -> int | None:
    """How many of the rows of a cached table's shard are stored in 8 bits by a precision plan; None without one."""
    collection: CachedEmbeddingBagCollection = option.module[1]
    widths = collection.bit_widths(option.name)
    if widths is None:
        return None
    start, rows = shard.offset[0], shard.size[0]
    counted = _wide_rows.setdefault(collection, {})
    key = (option.name, start, rows)
    if key not in counted:
        segments = rows_per_segment(widths, start, start + rows) if rows else [0] * len(widths.bits)
        counted[key] = sum(n for n, bits in zip(segments, widths.bits, strict=True) if bits > 4)
    return counted[key]
