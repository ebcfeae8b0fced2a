"""Run a function on several gloo ranks of this machine."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT_S = 150


def _rank(function: Callable[..., Any], rank: int, world_size: int, store: str, arguments: tuple[Any, ...], queue: Any) -> None:  # fmt: skip  # noqa: E501
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=_TIMEOUT_S),
        )
        queue.put((rank, function(*arguments), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise


def run_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Results of ``function(*arguments)`` by rank; no process is left behind.

    ``function`` must be importable, and its result made of plain Python values and NumPy arrays.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_rank, args=(function, rank, world_size, store, arguments, queue), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            results: dict[int, Any] = {}
            for _ in processes:
                rank, result, error = queue.get(timeout=_TIMEOUT_S)
                assert error is None, f"rank {rank}:\n{error}"
                results[rank] = result
            for process in processes:
                process.join(timeout=30)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]
