"""Counting lookups while a sharded model trains."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.distributed.sum_over_ranks import sum_over_ranks_
from torchrec_mpe.precision.frequency_counter import FrequencyCounter
from torchrec_mpe.upstream.sharded_tensor import Shard, ShardMetadata, gather_places

OfRank = Callable[[ShardedMPEEmbeddingBagCollection], Iterator[tuple[str, int, Tensor]]]

_SQUARED = "squared_weights/"  # before a table's name in a state dict


class TrackedFrequencies:
    """The lookups of a sharded model since :func:`track_frequencies_`, sharded like the rows.

    It is a ``torch.distributed.checkpoint`` Stateful: counts saved under one sharding load under another.
    """

    def __init__(self, collections: list[ShardedMPEEmbeddingBagCollection]) -> None:
        self._collections = collections

    def merged(self) -> FrequencyCounter:
        """The counts of whole tables, on CPU and equal on every rank; a collective, 8 bytes a row of host memory.

        Of weighted bags it has the squared weights too, another 8 bytes.
        """
        counts: dict[str, Tensor] = {}
        squared: dict[str, Tensor] = {}
        for collection in self._collections:
            for config in collection.embedding_bag_configs():
                for found, of_rank in ((counts, _counts), (squared, _squared_weights)):
                    if of_rank is _counts or collection.is_weighted():
                        found[config.name] = _merged(collection, of_rank, config.name, config.num_embeddings)
        return FrequencyCounter.from_counts(counts, squared)

    def local_bytes(self) -> int:
        """Bytes of this rank's counts."""
        found = (held for c in self._collections for of_rank in (_counts, _squared_weights) for held in of_rank(c))
        return sum(values.nbytes for _, _, values in found)

    def state_dict(self) -> dict[str, Any]:
        """A ShardedTensor int64 [num_embeddings] a table, which shares the counts' memory; a collective.

        Of weighted bags also one float64 [num_embeddings] of squared weights, ``squared_weights/<table>``.
        """
        return {
            f"{prefix}{config.name}": _sharded_tensor(collection, of_rank, config.name, config.num_embeddings)
            for collection in self._collections
            for prefix, of_rank in (("", _counts), (_SQUARED, _squared_weights))
            if not prefix or collection.is_weighted()
            for config in collection.embedding_bag_configs()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the counts of a :meth:`state_dict` of the same sharding.

        Raises:
            KeyError: if a table is missing.
        """
        for collection in self._collections:
            replicated = collection.data_parallel_tables()
            for prefix, of_rank in (("", _counts), (_SQUARED, _squared_weights)):
                for table, first, values in of_rank(collection):
                    key = f"{prefix}{table}"
                    if key not in state_dict:
                        raise KeyError(f"no counts for table {key}; counted tables: {', '.join(sorted(state_dict))}")
                    loaded = {s.metadata.shard_offsets[0]: s.tensor for s in state_dict[key].local_shards()}
                    if first in loaded:
                        values.copy_(loaded[first])
                    elif table in replicated:
                        values.zero_()  # the sum is on one rank


def track_frequencies_(model: nn.Module) -> TrackedFrequencies:
    """Count the lookups of every row from now on, while the model trains and not while it is evaluated.

    Counts are beside the rows, 8 bytes each, 16 where bags have weights, whose squares are added up too: what a rank
    counts is what it looks up, and no rank sends any.

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


def _counts(collection: ShardedMPEEmbeddingBagCollection) -> Iterator[tuple[str, int, Tensor]]:
    return collection.local_counts()


def _squared_weights(collection: ShardedMPEEmbeddingBagCollection) -> Iterator[tuple[str, int, Tensor]]:
    return collection.local_squared_weights()


def _merged(collection: ShardedMPEEmbeddingBagCollection, of_rank: OfRank, table: str, rows: int) -> Tensor:
    whole = torch.zeros(rows, dtype=torch.int64 if of_rank is _counts else torch.float64)
    for name, first, values in of_rank(collection):
        if name == table:
            whole[first : first + len(values)] = values
    return sum_over_ranks_(whole, collection.process_group, collection.device)


def _sharded_tensor(collection: ShardedMPEEmbeddingBagCollection, of_rank: OfRank, table: str, rows: int) -> Any:
    group = collection.process_group
    shards = [(first, values) for name, first, values in of_rank(collection) if name == table and len(values)]
    if table in collection.data_parallel_tables():
        # Each rank counted its own batches: the sum is put on one of them.
        whole = _merged(collection, of_rank, table, rows).to(collection.device)
        shards = [(0, whole)] if dist.get_rank(group) == 0 else []
    return gather_places(
        [
            Shard(counts, ShardMetadata([first], [len(counts)], f"rank:{dist.get_rank()}/{counts.device}"))
            for first, counts in shards
        ],
        rows,
        group=group,
    )
