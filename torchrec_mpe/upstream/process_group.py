"""The store under a process group."""

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store


def store_of_all_ranks() -> Store:
    """The store through which the ranks of the world met, for words between them beside collectives."""
    store: Store = dist.distributed_c10d._get_default_store()
    return store


def store_in_memory() -> Store:
    """For a group of one process, which needs no network."""
    return HashStore()
