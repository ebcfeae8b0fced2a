"""Topologies from text."""

import pytest

from torchrec_mpe.distributed.planner.cluster import parse_bytes, parse_topology, with_world_size


def test_sizes() -> None:
    assert [parse_bytes(t) for t in ("80GB", "1.5 TB", "2GiB", "7b")] == [80 * 10**9, 1_500 * 10**9, 2**31, 7]
    for text in ("80", "GB", "-1GB", "1XB", "0.1B"):
        with pytest.raises(ValueError, match="is no size in bytes"):
            parse_bytes(text)


def test_a_data_sheet_s_device() -> None:
    topology = parse_topology("64xH200", host_memory=2 * 10**12)
    assert (topology.world_size, topology.local_world_size, topology.compute_device) == (64, 8, "cuda")
    assert topology.devices[63].storage.hbm == 141 * 10**9
    assert topology.devices[0].storage.ddr == 250 * 10**9
    assert topology.hbm_mem_bw == 4.8e9  # bytes a millisecond
    assert (topology.intra_host_bw, topology.inter_host_bw) == (9e8, 5e7)


def test_memory_and_hosts_can_be_given() -> None:
    topology = parse_topology("6xA100", devices_per_host=3, device_memory=10**9)
    assert (topology.local_world_size, topology.devices[5].storage.hbm) == (3, 10**9)
    on_cpu = parse_topology("4xcpu:256GB")
    assert (on_cpu.compute_device, on_cpu.local_world_size) == ("cpu", 1)
    assert on_cpu.devices[0].storage.ddr == 256 * 10**9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("H100", "is no topology"),
        ("8xH1000", "names the device 'H1000'; known are"),
        ("0xH100", "has no devices"),
        ("8xCPU", "does not say how much memory"),
        ("12xH100", "12 devices cannot stand in hosts of 8 each"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_topology(text)


def test_resized_topologies_keep_everything_else() -> None:
    topology = parse_topology("16xB200", host_memory=4 * 10**12)
    larger = with_world_size(topology, 24)
    assert (larger.world_size, larger.local_world_size) == (24, 8)
    assert larger.devices[23].storage == topology.devices[0].storage
    assert (larger.hbm_mem_bw, larger.inter_host_bw) == (topology.hbm_mem_bw, topology.inter_host_bw)
    with pytest.raises(ValueError, match="20 devices do not fill hosts of 8"):
        with_world_size(topology, 20)
