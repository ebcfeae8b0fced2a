"""Adding up a tensor in host memory over the ranks of a job."""

import torch
import torch.distributed as dist
from torch import Tensor

_ROWS_PER_CHUNK = 1 << 22


def sum_over_ranks_(values: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Add up over the ranks of ``group``, in place and in chunks; every rank calls it and gets the sum.

    Args:
        values (Tensor): [rows] or [rows, columns], on CPU, of the same shape on every rank.
        group (Optional[ProcessGroup]): alone if None.
        device (torch.device): where the group's collectives work.
    """
    if group is None or dist.get_world_size(group) == 1:
        return values
    for chunk in values.split(_ROWS_PER_CHUNK):
        on_device = chunk.to(device)
        dist.all_reduce(on_device, group=group)
        if on_device.device != chunk.device:
            chunk.copy_(on_device)
    return values
