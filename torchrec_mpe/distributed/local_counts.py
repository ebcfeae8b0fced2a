"""How often each of this rank's rows is looked up."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.distributed.row_shard import shard_offsets
from torchrec_mpe.ops.count_ids import count_ids_


class LocalCounts:
    """Lookups of the rows of this rank's shards, counted where the rows are.

    Of a table cut by columns every shard sees the same ids, so only the shard of the first columns counts. Of a
    data-parallel table each rank counts its own batches.

    Args:
        tables (Iterable[Sequence[ShardedEmbeddingTable]]): of each lookup, in the order of its features.
        device (torch.device): of the counts.
        weighted (bool): bags have weights, whose squares are added up too.
    """

    def __init__(
        self, tables: Iterable[Sequence[ShardedEmbeddingTable]], device: torch.device, *, weighted: bool = False
    ) -> None:
        self._squared: list[Tensor] = []
        self._squared_shards: list[tuple[str, int, Tensor]] = []
        self._counts: list[Tensor] = []
        self._first_row: list[list[int]] = []
        self._num_rows: list[list[int]] = []
        self._shards: list[tuple[str, int, Tensor]] = []
        for of_lookup in tables:
            counted = [shard_offsets(table)[1] == 0 for table in of_lookup]
            rows = [table.local_rows if count else 0 for table, count in zip(of_lookup, counted, strict=True)]
            counts = torch.zeros(sum(rows), dtype=torch.int64, device=device)
            self._counts.append(counts)
            squared = torch.zeros(sum(rows), dtype=torch.float64, device=device) if weighted else None
            if squared is not None:
                self._squared.append(squared)
            self._first_row.append([])
            self._num_rows.append([])
            first = 0
            for table, count, n in zip(of_lookup, counted, rows, strict=True):
                self._first_row[-1] += [first] * table.num_features()
                self._num_rows[-1] += [n] * table.num_features()
                if count:
                    self._shards.append((table.name, shard_offsets(table)[0], counts[first : first + n]))
                    if squared is not None:
                        self._squared_shards.append((table.name, shard_offsets(table)[0], squared[first : first + n]))
                first += n

    def update(self, features: Iterable[KeyedJaggedTensor]) -> None:
        """Add a batch: of each lookup, the features that reached this rank, with ids counted from the shard's first."""
        squared: list[Tensor | None] = [*self._squared] or [None] * len(self._counts)
        for counts, squares, first_row, num_rows, of_lookup in zip(
            self._counts, squared, self._first_row, self._num_rows, features, strict=True
        ):
            if len(counts):
                ids, per_feature = of_lookup.values(), of_lookup.length_per_key()
                count_ids_(counts, ids, per_feature, first_row, num_rows)
                if squares is not None:
                    weights = of_lookup.weights().detach().double() ** 2
                    parts = zip(ids.split(per_feature), weights.split(per_feature), first_row, num_rows, strict=True)
                    for part, of_part, first, rows in parts:
                        if rows:
                            inside = (part >= 0) & (part < rows)
                            squares.index_add_(0, torch.where(inside, part, 0).long() + first, of_part * inside)

    def shards(self) -> Iterator[tuple[str, int, Tensor]]:
        """Table, first row, and counts int64 [rows] that :meth:`update` goes on changing."""
        yield from self._shards

    def squared_shards(self) -> Iterator[tuple[str, int, Tensor]]:
        """Table, first row, and sums of squared weights, float64 [rows]; nothing where bags have no weights."""
        yield from self._squared_shards
