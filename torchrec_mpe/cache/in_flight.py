"""Which batches' rows may yet be updated."""

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_mpe.upstream.tensors import changes_in_place


class PrefetchedBatch(NamedTuple):
    """A batch whose rows are in slots already.

    Attributes:
        indices, offsets (Tensor): of the batch.
        versions (Tuple[int, ...]): theirs; a buffer that was filled again holds another batch.
        slots (Tensor): [N], of every id.
        per_table (Sequence[int]): how many ids are of each table.
        number (int): of the batch.
    """

    indices: Tensor
    offsets: Tensor
    versions: tuple[int, ...]
    slots: Tensor
    per_table: Sequence[int]
    number: int

    def is_of(self, indices: Tensor, offsets: Tensor) -> bool:
        """Whether these are its ids and offsets."""
        if self.versions != versions(self.indices, self.offsets):
            return False
        return _equal(self.indices, indices) and _equal(self.offsets, offsets)


class BatchesInFlight:
    """Batches from their prefetch to their backward: their slots must stay as they are.

    A batch ends when its gradient comes, or when its graph is dropped without a backward.
    """

    def __init__(self) -> None:
        self._batches: set[int] = set()
        self._repeatable: _Flight | None = None  # the lookup whose backward may come again
        self.prefetched: deque[PrefetchedBatch] = deque()
        """Batches to be looked up, in order."""
        self.last = 0
        """Number of the last batch whose slots were assigned."""

    def start(self, batch: int) -> None:
        """A new batch, numbered higher than all before."""
        self.last = batch
        self._batches.add(batch)
        self.forbid_repeats()

    def end(self, batch: int) -> None:
        """Its rows are not going to be updated any more."""
        self._batches.discard(batch)

    def forbid_repeats(self) -> None:
        """Rows change place: no second backward may come through a lookup that has had one."""
        self._repeatable = None

    def take_prefetched(self, indices: Tensor, offsets: Tensor) -> PrefetchedBatch | None:
        """The prefetched batch with these ids, if there is one. Those before it are passed over and end."""
        while self.prefetched:
            batch = self.prefetched.popleft()
            if batch.is_of(indices, offsets):
                return batch
            self.end(batch.number)
        return None

    def drop_prefetched(self) -> None:
        """Their lookups find their rows by themselves."""
        for batch in self.prefetched:
            self.end(batch.number)
        self.prefetched.clear()

    def __bool__(self) -> bool:
        return bool(self._batches)

    def waits_for_backward(self) -> bool:
        """Whether a batch in flight was looked up already; prefetched ones may be dropped."""
        return not self._batches <= {batch.number for batch in self.prefetched}

    def oldest(self) -> int:
        """The first batch in flight; the next batch if there is none."""
        return min(self._batches, default=self.last + 1)

    def until_backward(self, output: Tensor, batch: int) -> Tensor:
        """``output``, with the batch in flight until its gradient comes or its graph is dropped."""
        # The hook runs right before the backward of the TBE, and lives as long as the graph.
        output.register_hook(_Flight(self, batch).gradient_came)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> "BatchesInFlight":
        """Of a copied model no batch is in flight: graphs belong to the original."""
        copied = BatchesInFlight()
        copied.last = self.last
        return copied


class _Flight:
    """Held by a graph."""

    def __init__(self, batches: BatchesInFlight, batch: int) -> None:
        self._batches = batches
        self._end = weakref.finalize(self, batches.end, batch)

    def gradient_came(self, gradient: Tensor) -> None:
        if self._end.alive:
            self._end()
            self._batches._repeatable = self
        elif self._batches._repeatable is not self:
            raise RuntimeError(
                "a second backward through the same lookup, after another batch was looked up or the cache was "
                "flushed: the rows may have left the cache; run the backwards before that"
            )


def versions(*tensors: Tensor) -> tuple[int, ...]:
    """How often each tensor was changed in place; 0 for inference tensors, which do not tell."""
    return tuple(map(changes_in_place, tensors))


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    same_memory = a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
    return same_memory or torch.equal(a, b)
