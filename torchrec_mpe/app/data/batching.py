"""Batches of rows for TorchRec: which rows, and how they become a KeyedJaggedTensor."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.errors import UserError

SHUFFLE_ROWS = 1 << 22
"""Rows shuffled together; larger splits are shuffled in pieces of so many rows."""
_CHUNK_ROWS = 1 << 12


def as_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """The array as a tensor over the same memory, which must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
        return torch.from_numpy(array)


def _shuffled_rows(rows: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Pieces of a permutation of the rows, of ``SHUFFLE_ROWS`` rows but for the last.

    Up to ``SHUFFLE_ROWS`` rows are permuted fully. More are cut into chunks of consecutive rows; the chunks are
    permuted, and then the rows of each ``SHUFFLE_ROWS`` rows' worth of chunks, so that memory stays bounded.
    """
    random = np.random.Generator(np.random.Philox(seed))
    if rows <= SHUFFLE_ROWS:
        yield random.permutation(rows)
        return
    chunks = random.permutation(-(-rows // _CHUNK_ROWS))
    for piece in np.array_split(chunks, np.arange(0, chunks.size, SHUFFLE_ROWS // _CHUNK_ROWS)[1:]):
        chosen = (piece[:, None] * _CHUNK_ROWS + np.arange(_CHUNK_ROWS)).reshape(-1)
        yield random.permutation(chosen[chosen < rows])


def count_batches(rows: int, batch_size: int, *, drop_last: bool, world_size: int) -> int:
    """How many batches :func:`row_selections` yields on each rank."""
    full, left = divmod(rows, batch_size * world_size)
    if drop_last or left == 0:
        return full
    # TorchRec cannot take a batch without rows, so fewer rows than ranks join the last full batch.
    return full + 1 if left >= world_size else max(full, 1)


def row_selections(
    rows: int, batch_size: int, *, shuffle_seed: int | None, drop_last: bool, rank: int, world_size: int, start: int = 0
) -> Iterator[slice | torch.Tensor]:
    """The rows of each batch of one rank from batch ``start`` on: a slice, or int64 [batch] when shuffled.

    ``batch_size * world_size`` consecutive rows of the (shuffled) order make one global batch, cut into equal parts in
    the order of ranks. The last global batch holds what is left, cut as evenly as can be; see :func:`count_batches`.
    """
    step = batch_size * world_size
    count = count_batches(rows, batch_size, drop_last=drop_last, world_size=world_size)

    def bounds(number: int) -> tuple[int, int]:
        first = number * step
        size = step if drop_last or number < count - 1 else rows - first
        return first + size * rank // world_size, first + size * (rank + 1) // world_size

    if shuffle_seed is None:
        for number in range(start, count):
            yield slice(*bounds(number))
        return
    pieces = _shuffled_rows(rows, shuffle_seed)
    order = np.zeros(0, np.int64)
    order_start = 0  # the place of order[0] in the whole permutation
    for number in range(start, count):
        begin, end = bounds(number)
        while end > order_start + order.size:
            keep = max(0, begin - order_start)
            order_start += min(keep, order.size)
            order = np.concatenate([order[keep:], next(pieces)])
        yield torch.from_numpy(order[begin - order_start : end - order_start])


@dataclass(frozen=True)
class Bags:
    """The bags of one field over n rows: row i holds ``values[offsets[i] : offsets[i + 1]]``.

    ``values`` is int32 [total], ``offsets`` is int64 [n + 1].
    """

    values: torch.Tensor
    offsets: torch.Tensor

    def take(self, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths int64 [rows] and values int32 [sum of lengths] of some rows, in their order."""
        if isinstance(rows, slice):
            offsets = self.offsets[rows.start : rows.stop + 1]
            return offsets.diff(), self.values[int(offsets[0]) : int(offsets[-1])]
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        ends = lengths.cumsum(0)
        places = torch.arange(int(ends[-1]) if ends.numel() else 0)
        places += torch.repeat_interleave(starts - ends + lengths, lengths)
        return lengths, self.values[places]


class BatchBuilder:
    """Makes TorchRec batches from the arrays of one split.

    Args:
        keys: the field names.
        labels: float32 [n].
        ids: int32 [n, single-valued fields].
        dense: float32 [n, dense features].
        bags: one entry a field: its bags, or None for a single-valued field, which takes the next column of ``ids``.
        num_embeddings: one entry a field.
        folder: of the arrays, for errors.
    """

    def __init__(
        self,
        keys: list[str],
        labels: torch.Tensor,
        ids: torch.Tensor,
        dense: torch.Tensor,
        bags: list[Bags | None],
        num_embeddings: list[int],
        folder: Path,
    ) -> None:
        self._keys = keys
        self._labels = labels
        self._ids = ids
        self._dense = dense
        self._bags = bags
        self._num_embeddings = num_embeddings
        single = [n for n, bag in zip(num_embeddings, bags, strict=True) if bag is None]
        self._limits = torch.tensor(single, dtype=torch.int32)
        self._folder = folder
        self._all_single = all(bag is None for bag in bags)
        self._ones: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def build(self, rows: slice | torch.Tensor) -> Batch:
        """The batch of the given rows; values, lengths and offsets are int64.

        Raises:
            UserError: if a file is damaged so that a label is neither 0 nor 1, or an id is none of its field.
        """
        if isinstance(rows, slice):
            labels, ids, dense = self._labels[rows].clone(), self._ids[rows], self._dense[rows].clone()
        else:
            labels = self._labels.index_select(0, rows)
            ids = self._ids.index_select(0, rows)
            dense = self._dense.index_select(0, rows)
        if bool(((ids < 0) | (ids >= self._limits)).any()):
            raise self._damaged("ids.npy", "an id that is none of its field")
        if bool(((labels != 0) & (labels != 1)).any()):
            raise self._damaged("labels.npy", "a label that is neither 0 nor 1")
        if not bool(dense.isfinite().all()):
            raise self._damaged("dense.npy", "a number that is not finite")
        size = labels.shape[0]
        columns = torch.empty((ids.shape[1], size), dtype=torch.int64).copy_(ids.t())
        sparse = self._single(columns, size) if self._all_single else self._mixed(columns, size, rows)
        return Batch(dense_features=dense, sparse_features=sparse, labels=labels)

    def _single(self, columns: torch.Tensor, size: int) -> KeyedJaggedTensor:
        if size not in self._ones:
            count = columns.numel()
            self._ones[size] = torch.ones(count, dtype=torch.int64), torch.arange(count + 1)
        lengths, offsets = self._ones[size]
        return KeyedJaggedTensor(
            keys=self._keys, values=columns.reshape(-1), lengths=lengths, offsets=offsets, stride=size
        )

    def _mixed(self, columns: torch.Tensor, size: int, rows: slice | torch.Tensor) -> KeyedJaggedTensor:
        ones = torch.ones(size, dtype=torch.int64)
        single = iter(columns)
        parts = [(ones, next(single)) if bag is None else self._take(k, bag, rows) for k, bag in enumerate(self._bags)]
        return KeyedJaggedTensor(
            keys=self._keys,
            values=torch.cat([values.to(torch.int64) for _, values in parts]),
            lengths=torch.cat([lengths for lengths, _ in parts]),
            stride=size,
        )

    def _take(self, field: int, bag: Bags, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ends = bag.offsets[rows.start : rows.stop + 1] if isinstance(rows, slice) else bag.offsets[rows + 1]
        starts = ends[:-1] if isinstance(rows, slice) else bag.offsets[rows]
        ends = ends[1:] if isinstance(rows, slice) else ends
        if bool(((starts < 0) | (ends < starts) | (ends > len(bag.values))).any()):
            raise self._damaged(f"{field}.offsets.npy", "a bag that is none of its values")
        lengths, values = bag.take(rows)
        if bool(((values < 0) | (values >= self._num_embeddings[field])).any()):
            raise self._damaged(f"{field}.values.npy", "an id that is none of its field")
        return lengths, values

    def _damaged(self, file: str, what: str) -> UserError:
        return UserError(f"{self._folder / file} is damaged, it holds {what}: prepare the log again")
