"""The process group that DistributedModelParallel needs, also in one process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from torchrec_mpe.upstream.process_group import store_in_memory


@contextmanager
def process_group(device: torch.device, timeout: timedelta | None = None) -> Iterator[None]:
    """Initialize the world group that torchx set up in the environment, or a group of one that needs no network.

    Args:
        device (torch.device): NCCL on CUDA, gloo on CPU.
        timeout (Optional[timedelta]): how long a rank waits for the others in a collective; torch's default if None.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized():
        yield
        return
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=store_in_memory(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
