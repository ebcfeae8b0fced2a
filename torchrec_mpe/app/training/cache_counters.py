"""The cached tables of a sharded model: what their caches count, the bytes they take, and their flush."""

from collections.abc import Iterator

from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.cache.statistics import CacheStatistics
from torchrec_mpe.distributed.cached_embeddingbag import ShardedCachedEmbeddingBagCollection
from torchrec_mpe.ops.cache_tensors import StoredRow


def cached_tbes(model: nn.Module) -> Iterator[CachedTableBatchedEmbeddingBags]:
    """Those of this rank, in a sharded model."""
    for collection in model.modules():
        if isinstance(collection, ShardedCachedEmbeddingBagCollection):
            for kernel in collection.kernels():
                if isinstance(kernel.emb_module, CachedTableBatchedEmbeddingBags):
                    yield kernel.emb_module


def cache_statistics(model: nn.Module) -> dict[str, CacheStatistics]:
    """Counters by table, of this rank's shards."""
    found: dict[str, CacheStatistics] = {}
    for collection in model.modules():
        if isinstance(collection, ShardedCachedEmbeddingBagCollection):
            found.update(collection.cache_statistics())
    return found


def cached_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that this rank's cached tables take in training, by kind; empty if there are none."""
    total: dict[str, int] = {}
    for tbe in cached_tbes(model):
        for kind, size in tbe.bytes_by_kind().items():
            total[kind] = total.get(kind, 0) + size
    return total


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the rows of this rank's stores without optimizer state: what would have to be served."""
    total = 0
    for tbe in cached_tbes(model):
        for table, store in zip(tbe.tables, tbe.stores(), strict=True):
            for bits, rows in ((4, store.rows4), (8, store.rows8)):
                total += len(rows) * StoredRow(bits, table.dim).bytes
            total += store.is_wide.nbytes + store.wide_before.nbytes
    return total


def flush(model: nn.Module) -> None:
    """Write all cached rows back to their stores."""
    for tbe in cached_tbes(model):
        tbe.flush()


def fp32_training_bytes(tables: list[EmbeddingBagConfig]) -> int:
    """Bytes of the same tables in fp32 with the state of row-wise Adagrad, one number a row."""
    return sum(4 * table.num_embeddings * (table.embedding_dim + 1) for table in tables)
