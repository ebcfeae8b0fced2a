"""What does not fit, and what would: for a planner that finds no plan."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    PlannerErrorType,
    ShardingOption,
    StorageReservation,
    Topology,
)

from torchrec_mpe.distributed.planner.cache_load import cached_tables
from torchrec_mpe.distributed.planner.cluster import with_world_size
from torchrec_mpe.distributed.planner.plan_report import PlanReport, TableReport, readable, table_of_bytes
from torchrec_mpe.distributed.planner.shard_bytes import ShardBytes
from torchrec_mpe.precision.frequency_counter import embedding_bag_configs
from torchrec_mpe.upstream.planner import reserved_share

_FUSED, _UVM_CACHING = EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.FUSED_UVM_CACHING.value
_MAX_DEVICES = 4096
_GROWTHS = 5
_HELD = ("rows", "store", "cache", "directory", "optimizer_state", "row_map", "row_counts")
_TABLES_NAMED = 8


@dataclass(frozen=True)
class Asked:
    """What no plan was found for: a model, devices, the batch size of a rank, the user's constraints by table, and what
    is reserved on the devices."""

    module: nn.Module
    topology: Topology
    batch_size: int
    constraints: dict[str, ParameterConstraints]
    reservation: StorageReservation


class PlanAgain(Protocol):
    """Plans the same with some changes; returns how to get the report of the plan, None if there is none."""

    def __call__(
        self,
        *,
        topology: Topology = ...,
        batch_size: int = ...,
        constraints: dict[str, ParameterConstraints] = ...,
    ) -> Callable[[], PlanReport] | None: ...


def explain(
    error_type: PlannerErrorType,
    asked: Asked,
    bytes_of_options: list[tuple[ShardingOption, list[ShardBytes]]],
    reserved: Topology,
    plan_again: PlanAgain,
) -> PlannerError:
    """An error with the bytes of every table, and the changes with which planning was tried again and succeeded.

    Args:
        error_type (PlannerErrorType): of TorchRec's error.
        asked (Asked): what no plan was found for.
        bytes_of_options (List[Tuple[ShardingOption, List[ShardBytes]]]): every option of every table, by shard.
        reserved (Topology): the devices, less what is reserved on them.
        plan_again (PlanAgain): tries a change.
    """
    lightest: dict[str, TableReport] = {}
    smallest_shard: dict[str, TableReport] = {}
    for option, shards in bytes_of_options:
        table = TableReport.of(option, shards)
        if option.fqn not in lightest or table.device_bytes < lightest[option.fqn].device_bytes:
            lightest[option.fqn] = table
        if option.fqn not in smallest_shard or table.largest_shard < smallest_shard[option.fqn].largest_shard:
            smallest_shard[option.fqn] = table
    tables = sorted(lightest.values(), key=lambda table: -table.device_bytes)
    cpu = reserved.compute_device == "cpu"
    every = [d.storage.ddr if cpu else d.storage.hbm for d in reserved.devices]
    held = sum(table.by_kind[kind] for table in tables for kind in _HELD)
    host = sum(table.host_bytes for table in tables)
    needed = sum(table.device_bytes + (table.host_bytes if cpu else 0) for table in tables)
    memory = _Memory(min(every), held + (host if cpu else 0), (needed - held) / len(every))
    why = f"the tables need {readable(needed)}, the devices have {readable(sum(every))} for them"
    taken = sum(d.storage.ddr if cpu else d.storage.hbm for d in asked.topology.devices) - sum(every)
    if taken:
        share = reserved_share(asked.reservation)
        of_each = f" ({share:.0%} of each device first)" if share else ""
        name = type(asked.reservation).__name__
        why += f" after {name} has kept {readable(taken)}{of_each}, which storage_reservation= changes"
    if needed <= sum(every):
        widest = max(smallest_shard.values(), key=lambda table: table.largest_shard)
        why += (
            f", but shards do not fill devices evenly; the largest that is needed is "
            f"{readable(widest.largest_shard)} of table {widest.name} ({widest.sharding_type})"
        )
    changes = list(_changes(asked, memory, plan_again))
    advice = "\n".join(f"- {change}" for change in changes) or (
        "- nothing that was tried: other sharding types, more devices, a smaller batch, rows in host memory"
    )
    return PlannerError(
        f"no sharding plan fits {len(every)} devices: {why}\n\n{table_of_bytes(tables)}\n\n"
        f"what fits, as planned again:\n{advice}",
        error_type,
    )


@dataclass(frozen=True)
class _Memory:
    """Bytes: what a device has for tables, what all tables hold between steps, and what a step adds on each device.

    The last does not depend on the number of devices: twice as many look up twice as many ids.
    """

    available: int
    held: int
    step: float


def _changes(asked: Asked, memory: _Memory, plan_again: PlanAgain) -> Iterator[str]:
    """Changes with which a plan was found; such as cannot do by their bytes alone are not tried."""
    world_size = asked.topology.world_size
    given = asked.constraints
    constrained = {name for name, constraint in given.items() if constraint.sharding_types}
    if constrained and memory.held / world_size + memory.step <= memory.available:
        relaxed = plan_again(constraints=_without_sharding_types(given))
        if relaxed is not None:
            kinds = {table.name: table.sharding_type for table in relaxed().tables}
            moved = [
                f"{name} {kinds[name]}"
                for name in sorted(constrained & set(kinds))
                if kinds[name] not in (given[name].sharding_types or ())
            ]
            yield f"other sharding types than the constraints': {_some(moved)}"
    devices = _fewest_devices(asked.topology, memory, plan_again)
    if devices is not None:
        yield f"{devices} devices of this kind instead of {world_size}"
    batch = asked.batch_size // 2
    room = memory.available - memory.held / world_size
    while batch and memory.step * batch / asked.batch_size > room:
        batch //= 2
    for smaller in (batch, batch // 2, batch // 4):
        if smaller and plan_again(batch_size=smaller) is not None:
            yield f"a batch of {smaller} examples a rank instead of {asked.batch_size}"
            break
    if asked.topology.compute_device == "cuda" and memory.step <= memory.available:
        uvm = plan_again(constraints=_with_uvm(given, asked.module))
        if uvm is not None:
            moved = [table.name for table in uvm().tables if table.compute_kernel == _UVM_CACHING]
            yield f"rows in host memory behind a cache (compute kernel {_UVM_CACHING}) for {_some(moved)}"


def _fewest_devices(topology: Topology, memory: _Memory, plan_again: PlanAgain) -> int | None:
    """The smallest number of whole hosts with which a plan is found, from what the bytes alone ask for."""
    world_size: int = topology.world_size
    host: int = topology.local_world_size
    if memory.available <= memory.step:
        return None
    fewest: int = math.ceil(memory.held / (memory.available - memory.step) / host)
    low = hosts = max(world_size // host + 1, fewest)
    for _ in range(_GROWTHS):
        if hosts * host > _MAX_DEVICES:
            return None
        if plan_again(topology=with_world_size(topology, hosts * host)) is not None:
            break
        low, hosts = hosts + 1, hosts * 5 // 4 + 1
    else:
        return None
    while low < hosts:
        middle = (low + hosts) // 2
        if plan_again(topology=with_world_size(topology, middle * host)) is not None:
            hosts = middle
        else:
            low = middle + 1
    return hosts * host


def _without_sharding_types(constraints: dict[str, ParameterConstraints]) -> dict[str, ParameterConstraints]:
    relaxed = {name: copy.copy(constraint) for name, constraint in constraints.items()}
    for constraint in relaxed.values():
        constraint.sharding_types = None
    return relaxed


def _with_uvm(constraints: dict[str, ParameterConstraints], module: nn.Module) -> dict[str, ParameterConstraints]:
    chosen = {name: copy.copy(constraint) for name, constraint in constraints.items()}
    cached = cached_tables(module)
    for table in embedding_bag_configs(module):
        if table.name in cached:  # its store is in host memory already, if CacheConfig says so
            continue
        constraint = chosen.setdefault(table.name, ParameterConstraints())
        if not constraint.compute_kernels:
            constraint.compute_kernels = [_FUSED, _UVM_CACHING]
    return chosen


def _some(names: list[str]) -> str:
    more = len(names) - _TABLES_NAMED
    return ", ".join(names[:_TABLES_NAMED]) + (f" and {more} more" if more > 0 else "")
