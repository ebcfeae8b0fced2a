"""Calls from several threads at once, and waiting for what others do."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor


def repeat_in_threads(calls: Sequence[Callable[[], object]], seconds: float) -> None:
    """Make each call again and again in a thread of its own, until the time is over or one raises; raises that."""
    stop = threading.Event()

    def repeat(call: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                call()
        finally:
            stop.set()

    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(repeat, call) for call in calls]
        stop.wait(seconds)
        stop.set()
    for call in running:
        call.result()


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Return as soon as a condition is true; fail if it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.002)
