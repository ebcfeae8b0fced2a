"""`torchrec-mpe plan`: how tables would be sharded on a cluster that need not be at hand."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, Topology
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_mpe.app.cli.output import check_output, write_json
from torchrec_mpe.app.training.quiet import quiet_dependencies
from torchrec_mpe.cache.config import CacheConfig, parse_cache_config
from torchrec_mpe.distributed.default_sharders import sharders
from torchrec_mpe.distributed.planner.cluster import DEVICES, parse_bytes, parse_topology
from torchrec_mpe.distributed.planner.planned_tables import PlannedTable, read_tables
from torchrec_mpe.distributed.planner.planner import MPEShardingPlanner
from torchrec_mpe.distributed.planner.storage_reservation import MPEStorageReservation
from torchrec_mpe.errors import UserError
from torchrec_mpe.modules.cached_embedding_bag_collection import CachedEmbeddingBagCollection
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.precision.plan import PrecisionPlan
from torchrec_mpe.upstream.fused_optimizers import FUSED_OPTIMIZERS

_OPTIMIZERS = {traits.option: optimizer for optimizer, traits in FUSED_OPTIMIZERS.items() if traits.option}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser("plan", help="plan the sharding of a model's tables, also for a cluster not at hand")
    parser.add_argument(
        "--tables",
        type=Path,
        required=True,
        metavar="FILE",
        help="YAML with a list `tables` of name, num_embeddings, embedding_dim, feature_names, and, if not the "
        "defaults, pooling (sum), pooling_factor (--pooling-factor), weighted (false)",
    )
    parser.add_argument(
        "--topology",
        required=True,
        help=f"number and kind of devices, such as 64xH100 or 16xCPU:256GB; kinds: {', '.join(DEVICES)}",
    )
    parser.add_argument("--phase", choices=[p.value for p in Phase], help="(default: search, or plain with --cache)")
    parser.add_argument("--batch-size", type=int, default=512, help="examples a device (default: 512)")
    parser.add_argument(
        "--pooling-factor", type=float, default=1.0, help="ids an example, where a table has none (default: 1)"
    )
    parser.add_argument(
        "--optimizer", choices=list(_OPTIMIZERS), default="rowwise_adagrad", help="of the rows (default: %(default)s)"
    )
    parser.add_argument("--precision", type=Path, metavar="FILE", help="a plan.json: also place the packed tables")
    parser.add_argument(
        "--cache",
        metavar="STORE:FRACTION",
        help="train in low precision with a cache of fp32 rows, for example int8:0.05 or int4:0.01:lru; with "
        "--precision, rows of at most 4 bits are stored in INT4 and the others in INT8",
    )
    parser.add_argument("--devices-per-host", type=int, help="(default: 8, CPU: 1)")
    parser.add_argument("--device-memory", metavar="SIZE", help="of each device, instead of the data sheet's: 80GB")
    parser.add_argument("--host-memory", metavar="SIZE", help="of each host (default: 128GiB a device)")
    parser.add_argument(
        "--reserve", type=float, default=0.15, help="part of device memory to leave free (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plan to this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Plan, print bytes by table and device, and write the plan."""
    topology, tables, precision = _check_options(options)
    cache = _cache(options)
    phase = Phase(options.phase or ("search" if cache is None else "plain"))
    quiet_dependencies()
    planner = MPEShardingPlanner(
        topology,
        options.batch_size,
        storage_reservation=MPEStorageReservation(options.reserve),
        constraints={t.config.name: ParameterConstraints(pooling_factors=list(t.pooling_factors)) for t in tables},
        stats=[],
        debug=False,
        phase=phase,
    )
    try:
        model = _model(tables, cache, precision)
        plan = planner.plan(model, sharders({"optimizer": _OPTIMIZERS[options.optimizer]}))
        packed = None if precision is None else planner.replan(precision)
    except PlannerError as error:
        raise UserError(str(error)) from error
    report = planner.report()
    cached = "" if cache is None else f", cache {options.cache}"
    print(f"{phase.value} phase{cached}, batch of {options.batch_size} a device, {options.topology}\n\n{report}")
    if packed is not None:
        print(f"\n{packed}")
    if options.json is not None:
        document = {
            "topology": _topology(options.topology, topology),
            "phase": phase.value,
            "cache": options.cache,
            "batch_size": options.batch_size,
            **report.to_dict(),
            "sharding_plan": _shards(plan),
            "packed": None if packed is None else packed.to_dict(),
        }
        write_json(options.json, document)
    return 0


def _check_options(options: argparse.Namespace) -> tuple[Topology, list[PlannedTable], PrecisionPlan | None]:
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {options.batch_size}")
    if not 0 < options.pooling_factor < float("inf"):
        raise UserError(f"--pooling-factor must be a positive number, got {options.pooling_factor}")
    if not 0 <= options.reserve < 1:
        raise UserError(f"--reserve must lie in [0, 1), got {options.reserve}")
    if options.devices_per_host is not None and options.devices_per_host < 1:
        raise UserError(f"--devices-per-host must be at least 1, got {options.devices_per_host}")
    check_output(options)
    try:
        topology = parse_topology(
            options.topology,
            devices_per_host=options.devices_per_host,
            device_memory=_size("--device-memory", options.device_memory),
            host_memory=_size("--host-memory", options.host_memory),
        )
    except ValueError as error:
        raise UserError(f"--topology: {error}") from error
    tables = read_tables(options.tables, options.pooling_factor)
    return topology, tables, None if options.precision is None else _precision(options.precision, tables)


def _cache(options: argparse.Namespace) -> CacheConfig | None:
    if options.cache is None:
        return None
    try:
        return parse_cache_config(options.cache)
    except ValueError as error:
        raise UserError(f"--cache: {error}") from error


def _size(option: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error


def _precision(path: Path, tables: list[PlannedTable]) -> PrecisionPlan:
    try:
        precision = PrecisionPlan.load(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    shapes = {t.config.name: (t.config.num_embeddings, t.config.embedding_dim) for t in tables}
    planned = {name: (t.num_embeddings, t.embedding_dim) for name, t in precision.tables.items()}
    for name in sorted({*shapes, *planned}):
        if shapes.get(name) != planned.get(name):
            found = {side: "no such table" if shape is None else "{} x {}".format(*shape) for side, shape in
                     (("file", shapes.get(name)), ("plan", planned.get(name)))}  # fmt: skip
            raise UserError(
                f"--precision {path}: table {name} is {found['plan']} there and {found['file']} in --tables: give the "
                "plan of these tables"
            )
    return precision


def _model(tables: list[PlannedTable], cache: CacheConfig | None, precision: PrecisionPlan | None) -> nn.Module:
    """The tables in a collection with weights and one without, on the meta device."""

    def collection(chosen: list[EmbeddingBagConfig], weighted: bool) -> MPEEmbeddingBagCollection:
        meta = torch.device("meta")
        if cache is None:
            return MPEEmbeddingBagCollection(chosen, weighted, meta)
        return CachedEmbeddingBagCollection(chosen, weighted, meta, cache, precision)

    return nn.ModuleDict(
        {
            name: collection(chosen, weighted)
            for name, weighted in (("unweighted", False), ("weighted", True))
            if (chosen := [t.config for t in tables if t.weighted == weighted])
        }
    )


def _topology(text: str, topology: Topology) -> dict[str, Any]:
    storage = topology.devices[0].storage
    return {
        "name": text,
        "devices": topology.world_size,
        "devices_per_host": topology.local_world_size,
        "device_bytes": storage.ddr if topology.compute_device == "cpu" else storage.hbm,
        "host_bytes_per_device": storage.ddr,
    }


def _shards(plan: ShardingPlan) -> Mapping[str, Any]:
    """By table: sharding type, compute kernel, and row and column offsets, sizes and rank of each shard."""
    return {
        table: {
            "sharding_type": sharding.sharding_type,
            "compute_kernel": sharding.compute_kernel,
            "ranks": sharding.ranks,
            "shards": [
                {"offsets": shard.shard_offsets, "sizes": shard.shard_sizes, "rank": shard.placement.rank()}
                for shard in (sharding.sharding_spec.shards if sharding.sharding_spec is not None else ())
            ],
        }
        for module in plan.plan.values()
        for table, sharding in module.items()
    }
