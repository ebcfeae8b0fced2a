"""Device memory that the planner leaves free for what is not embedding shards."""

from collections.abc import Mapping

from torch import nn
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, Storage, Topology
from torchrec.distributed.types import ModuleSharder, get_tensor_size_bytes

# Parameter, gradient, DDP's bucket, two states of Adam, and one to spare: the factor of TorchRec's
# HeuristicalStorageReservation.
_COPIES = 6


class MPEStorageReservation(FixedPercentageStorageReservation):
    """Reserves a part of every device's memory, and what is replicated on every device.

    Replicated are the dense network and the quantizers (step sizes, offsets, probabilities): 6 times their parameters'
    bytes, as in TorchRec's HeuristicalStorageReservation, which this follows without its warning and its 20 copies of
    the input. Row maps are not replicated but sharded: the storage estimator counts them.

    Args:
        percentage (float): of device memory, from 0 to 1, for the workspace of kernels and collectives, the CUDA
            context, and fragmentation.

    Raises:
        ValueError: if the percentage is outside.
    """

    def __init__(self, percentage: float = 0.15) -> None:
        if not 0 <= percentage < 1:
            raise ValueError(f"the reserved part of device memory must lie in [0, 1), got {percentage}")
        super().__init__(percentage)
        self.percentage = percentage

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: Mapping[str, ParameterConstraints] | None = None,
    ) -> Topology:
        """A copy of the topology with less memory; nothing is left rather than less than nothing."""
        # The last one reserved is this very object.
        reserved = super().reserve(topology, batch_size, module, sharders, constraints)
        replicated = _COPIES * replicated_parameter_bytes(module, sharders)
        for device, whole in zip(reserved.devices, topology.devices, strict=True):
            if topology.compute_device == "cpu":
                ddr = int(whole.storage.ddr * (1 - self.percentage)) - replicated
                device.storage = Storage(device.storage.hbm, max(0, ddr), device.storage.ssd)
            else:
                device.storage.hbm = max(0, device.storage.hbm - replicated)
        return reserved


def replicated_parameter_bytes(module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> int:
    """Bytes of the parameters that no sharder shards: those of the dense network and the quantizers."""
    by_type = {sharder.module_type: sharder for sharder in sharders}
    sharded: set[int] = set()
    for child in module.modules():
        sharder = by_type.get(type(child))
        if sharder is not None:
            sharded |= {id(parameter) for parameter in sharder.shardable_parameters(child).values()}
    return sum(get_tensor_size_bytes(p) for p in module.parameters() if id(p) not in sharded)
