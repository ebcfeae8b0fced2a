"""A full copy of a model on every device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torchrec_mpe.upstream.tensors import map_nested


class ReplicatedModel(nn.Module):
    """Copies of a model, one a device; each request goes to one of them as a whole, and its result stays there.

    Requests take turns. A server with its own queue a device calls ``replicas[k]`` itself, which is also what is
    traced or scripted.

    Args:
        replicas (Sequence[nn.Module]): the copies.
        devices (Sequence[torch.device]): of each.
    """

    def __init__(self, replicas: Sequence[nn.Module], devices: Sequence[torch.device]) -> None:
        super().__init__()
        self.replicas = nn.ModuleList(replicas)
        self.devices = list(devices)
        self._next = 0

    def forward(self, *args: Any, replica: int | None = None, **kwargs: Any) -> Any:
        """Run a request on one replica.

        Args:
            *args, **kwargs (Any): of the model; tensors, KeyedJaggedTensors and whatever else has ``.to(device)`` are
                copied to the replica's device, without blocking the host.
            replica (Optional[int]): which one; None: they take turns.

        Returns:
            Any: the model's result, on the replica's device.
        """
        if replica is None:
            replica = self._next
            self._next = (replica + 1) % len(self.devices)
        device = self.devices[replica]

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=True) if hasattr(value, "to") else value

        args, kwargs = map_nested(move, (args, kwargs), is_leaf=lambda value: hasattr(value, "to"))
        return self.replicas[replica](*args, **kwargs)
