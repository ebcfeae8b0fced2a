"""Counting lookups while a sharded model trains."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.distributed.sum_over_ranks import sum_over_ranks_
from torchrec_mpe.precision.frequency_counter import FrequencyCounter
from torchrec_mpe.upstream.sharded_tensor import Shard, ShardMetadata, gather_places


class TrackedFrequencies:
    """The lookups of a sharded model since :func:`track_frequencies_`, sharded like the rows.

    It is a ``torch.distributed.checkpoint`` Stateful: counts saved under one sharding load under another.
    """

    def __init__(self, collections: list[ShardedMPEEmbeddingBagCollection]) -> None:
        self._collections = collections

    def merged(self) -> FrequencyCounter:
        """The counts of whole tables, on CPU and equal on every rank; a collective, 8 bytes a row of host memory."""
        counts: dict[str, Tensor] = {}
        for collection in self._collections:
            for config in collection.embedding_bag_configs():
                counts[config.name] = _merged(collection, config.name, config.num_embeddings)
        return FrequencyCounter.from_counts(counts)

    def local_bytes(self) -> int:
        """Bytes of this rank's counts."""
        return sum(counts.nbytes for c in self._collections for _, _, counts in c.local_counts())

    def state_dict(self) -> dict[str, Any]:
        """A ShardedTensor int64 [num_embeddings] a table, which shares the counts' memory; a collective."""
        return {
            config.name: _sharded_tensor(collection, config.name, config.num_embeddings)
            for collection in self._collections
            for config in collection.embedding_bag_configs()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the counts of a :meth:`state_dict` of the same sharding.

        Raises:
            KeyError: if a table is missing.
        """
        for collection in self._collections:
            replicated = collection.data_parallel_tables()
            for table, first, counts in collection.local_counts():
                if table not in state_dict:
                    raise KeyError(f"no counts for table {table}; counted tables: {', '.join(sorted(state_dict))}")
                loaded = {s.metadata.shard_offsets[0]: s.tensor for s in state_dict[table].local_shards()}
                if first in loaded:
                    counts.copy_(loaded[first])
                elif table in replicated:
                    counts.zero_()  # the sum is on one rank


def track_frequencies_(model: nn.Module) -> TrackedFrequencies:
    """Count the lookups of every row from now on, while the model trains and not while it is evaluated.

    Counts are beside the rows, 8 bytes each: what a rank counts is what it looks up, and no rank sends any.

    Args:
        model (nn.Module): sharded, in any phase.

    Returns:
        TrackedFrequencies: to merge the counts when they are wanted, and to put into checkpoints.

    Raises:
        ValueError: if the model holds no sharded collection.

    Example::

        frequencies = track_frequencies_(dmp)
        ...                                       # train as ever
        counts = frequencies.merged()             # for prepare_search_ or precision_from_frequencies
    """
    collections = [module for module in model.modules() if isinstance(module, ShardedMPEEmbeddingBagCollection)]
    if not collections:
        raise ValueError(
            f"{type(model).__name__} holds no sharded MPEEmbeddingBagCollection: shard it with "
            "torchrec_mpe.sharders(), or count with count_frequencies"
        )
    for collection in collections:
        collection.start_counting()
    return TrackedFrequencies(collections)


def _merged(collection: ShardedMPEEmbeddingBagCollection, table: str, rows: int) -> Tensor:
    whole = torch.zeros(rows, dtype=torch.int64)
    for name, first, counts in collection.local_counts():
        if name == table:
            whole[first : first + len(counts)] = counts
    return sum_over_ranks_(whole, collection.process_group, collection.device)


def _sharded_tensor(collection: ShardedMPEEmbeddingBagCollection, table: str, rows: int) -> Any:
    group = collection.process_group
    shards = [(first, counts) for name, first, counts in collection.local_counts() if name == table and len(counts)]
    if table in collection.data_parallel_tables():
        # Each rank counted its own batches: the sum is put on one of them.
        whole = _merged(collection, table, rows).to(collection.device)
        shards = [(0, whole)] if dist.get_rank(group) == 0 else []
    return gather_places(
        [
            Shard(counts, ShardMetadata([first], [len(counts)], f"rank:{dist.get_rank()}/{counts.device}"))
            for first, counts in shards
        ],
        rows,
        group=group,
    )
