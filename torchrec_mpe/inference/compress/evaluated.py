"""A model that is asked for outputs and is the same afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.types import LazyAwaitable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.distributed.sum_over_ranks import sum_over_ranks_
from torchrec_mpe.upstream.embedding_bag_collection import device_of_sharded, group_of_sharded, tbes_of_sharded
from torchrec_mpe.upstream.tbe import SplitTableBatchedEmbeddingBagsCodegen, steps_kept

Forward = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> outputs [B] or [B, heads]."""


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model, sharded or not, into eval mode; then every module has its mode back, and no TBE has counted a step.

    Args:
        model (nn.Module): without what DistributedModelParallel and DistributedDataParallel put around it.
    """
    modes = [(module, module.training) for module in model.modules()]
    sharded = [module for module, _ in modes if isinstance(module, ShardedEmbeddingModule)]
    unsharded = [module for module, _ in modes if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)]
    with steps_kept(chain(unsharded, *map(tbes_of_sharded, sharded))):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:  # parents before children
                if isinstance(module, ShardedEmbeddingModule):
                    module.train(mode)  # its lookups are no submodules
                else:
                    module.training = mode


def ranks_of(model: nn.Module) -> tuple[dist.ProcessGroup | None, torch.device]:
    """The group over which a model is sharded or, with DistributedDataParallel, replicated, and its device."""
    wrapped: dist.ProcessGroup | None = None
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingModule):
            return group_of_sharded(module), device_of_sharded(module)
        if isinstance(module, DistributedDataParallel):
            wrapped = module.process_group
    first = next(chain(model.parameters(), model.buffers()), None)
    return wrapped, torch.device("cpu") if first is None else first.device


def mean_over_ranks(values: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> list[float]:
    """Of values [n] in host memory, of which every rank has its own; alone if there is no group."""
    sums = sum_over_ranks_(values.double(), group, device)
    means: list[float] = (sums / (1 if group is None else dist.get_world_size(group))).tolist()
    return means


def outputs_of(model: nn.Module, batch: Any, forward: Forward | None, device: torch.device) -> Tensor:
    """What a model makes of a batch, [B] or [B, heads].

    Args:
        model (nn.Module): the model.
        batch (Any): for ``forward``; without one, a batch as of torchrec.datasets, or a KeyedJaggedTensor.
        forward (Optional[Callable]): (model, batch) -> outputs; by default ``model(dense_features, sparse_features)``,
            or ``model(batch)`` of a KeyedJaggedTensor.
        device (torch.device): where a batch goes that ``forward`` is not given.

    Raises:
        ValueError: if that is no tensor of such a shape.
    """
    if forward is not None:
        outputs = forward(model, batch)
    elif isinstance(batch, KeyedJaggedTensor):
        outputs = model(batch.to(device))
    else:
        outputs = model(batch.dense_features.to(device), batch.sparse_features.to(device))
    if isinstance(outputs, LazyAwaitable):
        outputs = outputs.wait()
    if not isinstance(outputs, Tensor) or outputs.dim() not in (1, 2):
        what = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"the model's output must be a tensor [batch] or [batch, heads], got {what}: give forward, a function of "
            "(model, batch) that returns one"
        )
    return outputs
