"""Where packed tables go: exact bytes, the fewest devices, nothing lost."""

from collections.abc import Mapping

import pytest
import torch
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingType

from tests.packing.random_codings import random_coding
from torchrec_mpe import PrecisionPlan
from torchrec_mpe.distributed.planner.cluster import parse_topology
from torchrec_mpe.distributed.planner.packed_placement import PackedPlacement, place_packed
from torchrec_mpe.distributed.planner.packed_rows import shape_of_rows, widths_of_rows
from torchrec_mpe.distributed.planner.planner import MPEShardingPlanner
from torchrec_mpe.distributed.planner.storage_reservation import MPEStorageReservation
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.size import packed_bytes
from torchrec_mpe.packing.table_coding import TableCoding


def widths(rows: int, dim: int, mapped: bool, seed: int = 0) -> TableBitWidths:
    bounds = (0, rows // 10, rows // 2, rows)
    ranks = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).int() if mapped else None
    return TableBitWidths(rows, dim, bounds, (6, 2, 0), ranks)


def precision(**tables: TableBitWidths) -> PrecisionPlan:
    return PrecisionPlan(tables, (0, 2, 6))


PLAN = precision(
    a=widths(30_000, 16, False), b=widths(20_000, 16, True), c=widths(5_000, 32, True, 1), d=widths(900, 16, False)
)


def test_replan_replicates_what_fits_one_device() -> None:
    total = PLAN.size_report().total
    planner = MPEShardingPlanner(
        parse_topology("64xH100"), storage_reservation=MPEStorageReservation(0.2), stats=[], debug=False
    )
    placement = planner.replan(PLAN)
    assert (placement.num_devices, placement.replicate) == (1, True)
    assert placement.total_bytes == total == sum(placement.device_bytes)
    assert placement.available == 64 * 10**9
    assert "replicate them on every one of the 64, no communication" in str(placement)
    module_plan = placement.sharding_plan("cuda", 8)
    assert {sharding.sharding_type for sharding in module_plan.values()} == {ShardingType.DATA_PARALLEL.value}
    assert module_plan["a"].ranks == list(range(64))


def test_exactly_fitting_one_device_is_replicated_and_one_byte_less_is_not() -> None:
    total = PLAN.size_report().total
    assert place_packed(PLAN, total, 4).replicate
    smaller = place_packed(PLAN, total - 1, 4)
    assert (smaller.num_devices, smaller.replicate) == (2, False)


def check(placement: PackedPlacement, plan: PrecisionPlan) -> None:
    check_tables(placement, plan.tables)


def check_tables(placement: PackedPlacement, tables: Mapping[str, TableBitWidths | TableCoding]) -> None:
    """Every row of every table once, and on each device what packing its shards together really takes."""
    rows = {name: torch.zeros(table.num_embeddings, dtype=torch.int64) for name, table in tables.items()}
    for shard in placement.shards:
        rows[shard.table][shard.first_row : shard.first_row + shard.num_rows] += 1
    assert all(bool((count == 1).all()) for count in rows.values())
    for device, nbytes in enumerate(placement.device_bytes):
        own = {
            f"{s.table}/{s.first_row}": widths_of_rows(tables[s.table], s.first_row, s.first_row + s.num_rows)
            for s in placement.shards
            if s.device == device
        }
        assert packed_bytes(own).total == nbytes <= placement.available


@pytest.mark.parametrize("devices", [2, 3, 5])
def test_fewest_devices_and_exact_bytes(devices: int) -> None:
    total = PLAN.size_report().total
    available = int(total / (devices - 0.5))
    placement = place_packed(PLAN, available, 8)
    check(placement, PLAN)
    assert placement.num_devices == -(-total // available) == devices


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_codings_are_placed_by_their_bytes(devices: int) -> None:
    codings = {f"t{k}": random_coding(k, 9_000, 16, 8, remap=k == 1)[0] for k in range(3)}
    total = packed_bytes(codings).total
    planner = MPEShardingPlanner(parse_topology("8xH100"), stats=[], debug=False)
    placement = planner.replan(codings, available=total if devices == 1 else int(total / (devices - 0.5)))
    check_tables(placement, codings)
    assert (placement.num_devices, placement.total_bytes) == (devices, total)


def test_whole_tables_where_they_fit() -> None:
    plan = precision(**{f"t{k}": widths(10_000, 16, False) for k in range(8)})
    one = packed_bytes({"t": widths(10_000, 16, False)}).total
    placement = place_packed(plan, 2 * one, 16)
    check(placement, plan)
    assert placement.num_devices == 4
    assert len(placement.shards) == 8
    module_plan = placement.sharding_plan("cpu")
    assert {sharding.sharding_type for sharding in module_plan.values()} == {ShardingType.TABLE_WISE.value}


def test_a_table_larger_than_a_device_is_split_by_rows() -> None:
    plan = precision(large=widths(50_000, 16, True), small=widths(100, 16, False))
    placement = place_packed(plan, plan.size_report().total * 2 // 5, 8)
    check(placement, plan)
    large = placement.sharding_plan("cuda", 8)["large"]
    assert large.sharding_type == ShardingType.ROW_WISE.value
    shards = large.sharding_spec.shards
    assert sum(shard.shard_sizes[0] for shard in shards) == 50_000
    assert [shard.placement.rank() for shard in shards] == large.ranks


def test_too_few_devices_are_said_with_how_many_would_do() -> None:
    total = PLAN.size_report().total
    with pytest.raises(PlannerError, match="4 such devices hold them") as raised:
        place_packed(PLAN, int(total / 3.5), 2)
    message = str(raised.value)
    assert message.startswith("the packed tables do not fit into 2 devices with")
    for name, table in PLAN.tables.items():
        assert f"{packed_bytes({name: table}).total:,}" in message
    with pytest.raises(PlannerError, match="no number of such devices holds them"):
        place_packed(PLAN, 10, 2)


def places(coding: TableCoding) -> list[int]:
    return list(range(coding.num_embeddings)) if coding.order is None else coding.order.tolist()


@pytest.mark.parametrize("mapped", [False, True])
def test_widths_of_a_range_are_those_of_its_rows(mapped: bool) -> None:
    whole = widths(1_000, 16, mapped)
    for start, stop in ((0, 1_000), (0, 1), (37, 640), (990, 1_000)):
        part = widths_of_rows(whole, start, stop)
        assert torch.equal(part.of_rows(), whole.of_rows()[start:stop])
        assert (part.order is None) == (not mapped)
        assert packed_bytes({"t": part}).total == packed_bytes({"t": shape_of_rows(whole, start, stop)}).total
    coding, _ = random_coding(4, 1_000, 16, 8, remap=mapped)
    for start, stop in ((0, 1_000), (0, 1), (37, 640), (990, 1_000)):
        part = widths_of_rows(coding, start, stop)
        groups = [next(g for g, high in enumerate(coding.bounds[1:]) if place < high) for place in places(coding)]
        own = [next(g for g, high in enumerate(part.bounds[1:]) if place < high) for place in places(part)]
        assert [part.groups[g] for g in own] == [coding.groups[g] for g in groups[start:stop]]
        assert packed_bytes({"t": part}).total == packed_bytes({"t": shape_of_rows(coding, start, stop)}).total
    with pytest.raises(ValueError, match="rows 5 to 1001 are no part of a table of 1000 rows"):
        widths_of_rows(whole, 5, 1_001)
