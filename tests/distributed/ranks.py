"""Run functions on several gloo ranks of this machine."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT_S = 100


def _rank(connection: Connection, rank: int, world_size: int, ranks_per_host: int, store: str) -> None:
    torch.set_num_threads(1)
    # TorchRec groups ranks into hosts by these; one machine plays several hosts.
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_host)
    os.environ["LOCAL_RANK"] = str(rank % ranks_per_host)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    while (task := connection.recv()) is not None:
        function, arguments = task
        try:
            connection.send((function(*arguments), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))
            raise
    dist.barrier()
    dist.destroy_process_group()


class Ranks:
    """Ranks that run one function after another, for starting processes is what takes time.

    After a failure of any rank the processes are killed, and the next function gets new ones.

    Args:
        world_size (int): number of ranks.
        ranks_per_host (Optional[int]): as if on hosts of so many ranks each; all on one host if None.
    """

    def __init__(self, world_size: int, ranks_per_host: int | None = None) -> None:
        self._world_size = world_size
        self._ranks_per_host = ranks_per_host or world_size
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results of ``function(*arguments)`` by rank.

        ``function`` must be importable, and its result made of plain Python values and NumPy arrays.
        """
        if not self._processes:
            self._start()
        results: dict[int, Any] = {}
        try:
            for connection in self._connections:
                connection.send((function, arguments))
            while len(results) < self._world_size:
                waiting = [c for k, c in enumerate(self._connections) if k not in results]
                ready = wait(waiting, timeout=_TIMEOUT_S)
                assert ready, f"no answer from {len(waiting)} ranks in {_TIMEOUT_S} s"
                for rank, connection in enumerate(self._connections):
                    if connection in ready:
                        results[rank], error = connection.recv()
                        assert error is None, f"rank {rank}:\n{error}"
        except BaseException:
            self._kill()
            raise
        return [results[rank] for rank in range(self._world_size)]

    def close(self) -> None:
        """End the processes."""
        try:
            for connection in self._connections:
                connection.send(None)
            for process in self._processes:
                process.join(timeout=30)
        finally:
            self._kill()

    def _start(self) -> None:
        # Forked from a process that has imported what ranks need and has started no thread.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.equality", "tests.distributed.cached_cases"])
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        for rank in range(self._world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_rank, args=(there, rank, self._world_size, self._ranks_per_host, store), daemon=True
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._folder, self._processes, self._connections = None, [], []
