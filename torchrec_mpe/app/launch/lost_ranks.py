"""One clear sentence where a rank waits in vain for the others."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from torchrec_mpe.errors import UserError
from torchrec_mpe.upstream.process_group import store_of_all_ranks

_TIMED_OUT = ("timed out", "timeout", "failed to pass monitoredbarrier")
_DISCONNECTED = ("connection closed", "connection reset", "broken pipe", "connection refused", "remote server shutdown")
_GRACE = timedelta(seconds=10)


class RankLostError(RuntimeError):
    """Another rank has died, or did not come to a collective within the timeout."""


@contextmanager
def name_lost_ranks(place: Callable[[], str], timeout: timedelta) -> Iterator[None]:
    """Turn the errors of collectives that the other ranks did not come to into a RankLostError.

    Every rank that waits in vain tells so in the store of the process group; those that do not are the ones to look at.
    NCCL ends the process itself after the timeout, with its own report.

    Args:
        place (Callable[[], str]): where this rank is, "after step 37 of search".
        timeout (timedelta): of the process group's collectives.
    """
    try:
        yield
    except BaseException as error:  # torch.distributed.checkpoint's errors are no Exceptions
        text = str(error).lower()
        if not dist.is_initialized() or isinstance(error, RankLostError | UserError):
            raise
        if any(words in text for words in _TIMED_OUT):
            raise RankLostError(
                f"rank {dist.get_rank()} waited {timeout.total_seconds():g} s {place()} for {_silent_ranks(timeout)}: "
                "a rank has stopped or is much slower than the others; --timeout is how long ranks wait for each other"
            ) from error
        if any(words in text for words in _DISCONNECTED):
            raise RankLostError(
                f"rank {dist.get_rank()} lost its connection to another rank {place()}: the other rank ended first, "
                "see its own error"
            ) from error
        raise


def _silent_ranks(timeout: timedelta) -> str:
    """Which ranks do not say within a grace period that they wait too."""
    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    key = f"torchrec_mpe/waits_in_vain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    grace = min(_GRACE, timeout).total_seconds()
    waiting: set[int] = set()

    def ask() -> None:
        store = store_of_all_ranks()
        store.set(f"{key}/{rank}", "1")
        while len(waiting) < len(ranks):
            waiting.update(other for other in ranks if other not in waiting and store.check([f"{key}/{other}"]))
            time.sleep(0.1)

    # In a thread, because a store without an answer blocks: rank 0 holds it.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(grace)
    silent = [other for other in ranks if other not in waiting and other != rank]
    if not silent:
        return "the other ranks, which all wait too: the network may have failed"
    if not waiting:
        return "rank 0, which does not answer"
    return f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
