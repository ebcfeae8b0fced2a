"""Steps that all ranks of a save or load go through together, so that an error on one ends it on all."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """The ranks of the world, in a gloo group of their own; a single process alone without a process group.

    A group of its own lets a thread write a checkpoint while training uses the others, and NCCL has no objects.

    Args:
        timeout (Optional[timedelta]): of a collective, that is, how much longer the slowest rank may take than the
            fastest; gloo's default if None.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._timeout = timeout
        self._group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def group(self) -> dist.ProcessGroup | None:
        """The group, made at the first call, to which all ranks must come; None without a process group."""
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self._group

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        group = self.group()
        if group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=group)
        return values

    def together(self, function: Callable[[], T]) -> T:
        """Run ``function``, which itself has no collective, on every rank; returns this rank's result.

        Raises:
            Exception: what the function raised here, or else on the first rank where it did.
        """
        result, error = _outcome(function)
        errors = self.gather(error)
        if error is not None:
            raise error
        for rank, other in enumerate(errors):
            if other is not None:
                raise RuntimeError(f"rank {rank} failed: {type(other).__name__}: {other}") from other
        return result  # type: ignore[return-value]

    def on_rank_0(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0; returns its result, or raises its error, on every rank."""
        outcome = _outcome(function) if self.rank == 0 else (None, None)
        group = self.group()
        if group is not None:
            box = [outcome]
            dist.broadcast_object_list(box, src=0, group=group)
            outcome = box[0]
        result, error = outcome
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error
