"""Running statistics of batch normalization, which each rank gathers from its own batches."""

import torch
import torch.distributed as dist
from torch import nn

from torchrec_mpe.upstream.modules import running_statistics


@torch.no_grad()
def average_batch_norms(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every rank the mean of the ranks' running statistics.

    They are linear in the batches', so that averaging once more in between changes nothing but rounding.

    Args:
        model (nn.Module): of the same modules on every rank, which all call it.
        group (Optional[ProcessGroup]): the world by default.
    """
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return
    for module in model.modules():
        for statistics in running_statistics(module):
            dist.all_reduce(statistics, group=group)
            statistics /= ranks
