"""Clusters that are not at hand: device facts, and the topology of a number of devices."""

import re
from dataclasses import dataclass

from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    Topology,
    TopologyFactory,
    TrainerConfig,
)

from torchrec_mpe.upstream.planner import HOST_MEMORY_BANDWIDTH

_GB = 10**9
_UNITS = {"B": 1, **{f"{prefix}B": 1000**k for k, prefix in enumerate("KMGT", 1)}}
_UNITS |= {f"{prefix}IB": 1024**k for k, prefix in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Device:
    """A device's memory and bandwidths.

    Attributes:
        compute_device (str): "cuda" or "cpu".
        memory (int): bytes.
        memory_bandwidth (float): bytes a second.
        link_bandwidth (float): bytes a second to the other devices of a host, both directions together.
        network_bandwidth (float): bytes a second to other hosts.
        host_link_bandwidth (float): bytes a second to host memory, one direction.
    """

    compute_device: str
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    host_link_bandwidth: float


def _gpu(memory_gb: int, memory: float, link: float, network: float, host_link: float) -> Device:
    return Device("cuda", memory_gb * _GB, memory * _GB, link * _GB, network * _GB, host_link * _GB)


# GB as the data sheets have them, 10^9 bytes; devices report a little more. Memory, its bandwidth, NVLink or PCIe:
# NVIDIA's data sheet of each device (SXM form where there is one; B200: an eighth of HGX B200). Network: DGX-1 (V100,
# 4 x 100 Gb/s for 8 GPUs), DGX A100 (200 Gb/s a GPU), DGX H100, H200 and B200 (400 Gb/s a GPU); L4 and L40S are taken
# with 100 Gb/s. Host link: PCIe 3.0 16, 4.0 32, 5.0 64 GB/s.
DEVICES = {
    "V100": _gpu(32, 900, 300, 6.25, 16),
    "A100": _gpu(80, 2_039, 600, 25, 32),
    "A100-40GB": _gpu(40, 1_555, 600, 25, 32),
    "L4": _gpu(24, 300, 64, 12.5, 32),
    "L40S": _gpu(48, 864, 64, 12.5, 32),
    "H100": _gpu(80, 3_350, 900, 50, 64),
    "H200": _gpu(141, 4_800, 900, 50, 64),
    "B200": _gpu(180, 7_700, 1_800, 50, 64),
    # One rank on a host of its own; memory must be given.
    "CPU": Device("cpu", 0, HOST_MEMORY_BANDWIDTH * 1000, 12.5 * _GB, 12.5 * _GB, HOST_MEMORY_BANDWIDTH * 1000),
}
"""Devices by name."""


def parse_bytes(text: str) -> int:
    """``"80GB"`` as a number of bytes; units B, kB, MB, GB, TB (powers of 1000) and KiB to TiB (powers of 1024).

    Raises:
        ValueError: if it is no positive size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size in bytes such as 80GB or 64GiB")
    return size


def parse_topology(
    text: str,
    *,
    devices_per_host: int | None = None,
    device_memory: int | None = None,
    host_memory: int | None = None,
) -> Topology:
    """The topology that ``"64xH100"`` or ``"16xCPU:256GB"`` names.

    Args:
        text (str): ``<number>x<device>`` or ``<number>x<device>:<memory>``, with a device of :data:`DEVICES`.
        devices_per_host (Optional[int]): 8 by default, or all if there are fewer; 1 for CPU.
        device_memory (Optional[int]): bytes of each device, instead of the data sheet's.
        host_memory (Optional[int]): bytes of each host, for all its devices; TorchRec's 128 GiB a device by default.

    Raises:
        ValueError: if the text, or a number, makes no topology.
    """
    found = re.fullmatch(r"(\d+)\s*[xX]\s*([\w-]+)(?::(.+))?", text.strip())
    if not found:
        raise ValueError(f"{text!r} is no topology: write a number and a device, such as 64xH100 or 16xCPU:256GB")
    count, name = int(found[1]), found[2].upper()
    if name not in DEVICES:
        raise ValueError(f"{text!r} names the device {found[2]!r}; known are {', '.join(DEVICES)}")
    device = DEVICES[name]
    if count < 1:
        raise ValueError(f"{text!r} has no devices")
    memory = device_memory or (parse_bytes(found[3]) if found[3] else device.memory)
    if not memory:
        raise ValueError(f"{text!r} does not say how much memory a rank has: write for example {count}xCPU:256GB")
    per_host = devices_per_host or (1 if device.compute_device == "cpu" else min(8, count))
    if count % per_host:
        raise ValueError(f"{count} devices cannot stand in hosts of {per_host} each")
    return _topology(
        device.compute_device,
        count,
        per_host,
        memory,
        None if host_memory is None else host_memory // per_host,
        HardwareConfig(
            hbm_mem_bw=device.memory_bandwidth / 1000,
            intra_host_bw=device.link_bandwidth / 1000,
            inter_host_bw=device.network_bandwidth / 1000,
            hbm_to_ddr_mem_bw=device.host_link_bandwidth / 1000,
        ),
    )


def _topology(
    compute_device: str, count: int, per_host: int, memory: int, host_memory: int | None, hardware: HardwareConfig
) -> Topology:
    cpu = compute_device == "cpu"
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=count,
            local_world_size=per_host,
            hbm_cap_bytes=None if cpu else memory,
            ddr_cap_bytes=memory if cpu else host_memory,
        ),
        hardware_config=hardware,
        kernel_config=KernelConfig(compute_device=compute_device, use_hardware_based_bandwidth=True),
    )


def with_world_size(topology: Topology, world_size: int) -> Topology:
    """As many devices as asked for like the smallest of a topology, in hosts of the same size.

    Raises:
        ValueError: if they do not fill whole hosts.
    """
    per_host = topology.local_world_size
    if world_size % per_host:
        raise ValueError(f"{world_size} devices do not fill hosts of {per_host}")
    memory = {
        f"{kind}_cap_bytes": min(getattr(device.storage, kind) for device in topology.devices)
        for kind in ("hbm", "ddr", "ssd")
    }
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(world_size=world_size, local_world_size=per_host, **memory),
        hardware_config=HardwareConfig(
            hbm_mem_bw=topology.hbm_mem_bw,
            ddr_mem_bw=topology.ddr_mem_bw,
            ssd_mem_bw=topology.ssd_mem_bw,
            hbm_to_ddr_mem_bw=topology.hbm_to_ddr_mem_bw,
        ),
        kernel_config=KernelConfig(
            compute_device=topology.compute_device,
            bwd_compute_multiplier=topology.bwd_compute_multiplier,
            weighted_feature_bwd_compute_multiplier=topology.weighted_feature_bwd_compute_multiplier,
            uneven_sharding_perf_multiplier=topology.uneven_sharding_perf_multiplier,
            use_hardware_based_bandwidth=True,
            generalized_comms_bandwidths=topology.comms_bandwidths,
        ),
    )
