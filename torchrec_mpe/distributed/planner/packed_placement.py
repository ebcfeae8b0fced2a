"""Where the packed tables of a precision plan go, on as few devices as hold them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingType,
    ShardMetadata,
)

from torchrec_mpe.distributed.planner.packed_rows import shape_of_rows
from torchrec_mpe.distributed.planner.plan_report import readable
from torchrec_mpe.files.text_table import text_table
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.size import packed_bytes
from torchrec_mpe.packing.table_coding import TableCoding
from torchrec_mpe.precision.plan import PrecisionPlan

_Coding: TypeAlias = TableBitWidths | TableCoding
_Size: TypeAlias = Callable[[Mapping[str, _Coding]], int]
# A split table's parts end at a multiple of its rows' 256th part: a search over few sizes.
_PARTS = 256


@dataclass(frozen=True)
class PackedShard:
    """A whole packed table, or a range of its rows, on one device.

    Attributes:
        table (str): name.
        device (int): rank.
        first_row (int): 0 for a whole table.
        num_rows (int): rows of the shard.
        embedding_dim (int): elements of a row.
        nbytes (int): bytes of the shard packed by itself: rows, directory, scales, zero rows and padding. Shards on one
            device share scales and end padding, so that together they take a little less.
    """

    table: str
    device: int
    first_row: int
    num_rows: int
    embedding_dim: int
    nbytes: int


@dataclass(frozen=True)
class PackedPlacement:
    """The plan for the packed model.

    Attributes:
        shards (tuple[PackedShard, ...]): of every table; if ``replicate`` those of one copy, on device 0.
        device_bytes (tuple[int, ...]): exact bytes of the packed tables of each device that is used.
        total_bytes (int): exact bytes of one copy in one piece: the size report's total.
        available (int): bytes that a device has for packed tables.
        world_size (int): devices of the topology.

    Example::

        placement = planner.replan(precision)
        placement.num_devices             # 1
        placement.replicate               # True: a full copy on every device, no communication
        print(placement)
    """

    shards: tuple[PackedShard, ...]
    device_bytes: tuple[int, ...]
    total_bytes: int
    available: int
    world_size: int

    @property
    def num_devices(self) -> int:
        """How many devices the packed tables need."""
        return len(self.device_bytes)

    @property
    def replicate(self) -> bool:
        """Whether one device holds all tables, so that every device can have a full copy and needs no communication."""
        return self.num_devices == 1

    def sharding_plan(self, compute_device: str, local_world_size: int | None = None) -> EmbeddingModuleShardingPlan:
        """The plan in TorchRec's form: DATA_PARALLEL, or TABLE_WISE for whole and ROW_WISE for split tables.

        The row ranges of a split table are of any size, and on any ranks, as the sharding specs say.

        Args:
            compute_device (str): "cpu" or "cuda".
            local_world_size (Optional[int]): devices of a host; all of them by default.
        """
        local = local_world_size or self.world_size
        by_table: dict[str, list[PackedShard]] = {}
        for shard in self.shards:
            by_table.setdefault(shard.table, []).append(shard)
        plan = EmbeddingModuleShardingPlan()
        for table, shards in by_table.items():
            kind = ShardingType.TABLE_WISE if len(shards) == 1 else ShardingType.ROW_WISE
            spec = EnumerableShardingSpec(
                [
                    ShardMetadata(
                        shard_offsets=[shard.first_row, 0],
                        shard_sizes=[shard.num_rows, shard.embedding_dim],
                        placement=placement(compute_device, shard.device, local),
                    )
                    for shard in shards
                ]
            )
            plan[table] = ParameterSharding(
                sharding_type=(ShardingType.DATA_PARALLEL if self.replicate else kind).value,
                compute_kernel=EmbeddingComputeKernel.QUANT.value,
                ranks=list(range(self.world_size)) if self.replicate else [shard.device for shard in shards],
                sharding_spec=None if self.replicate else spec,
            )
        return plan

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings only, for JSON."""
        return {
            "num_devices": self.num_devices,
            "replicate": self.replicate,
            "total_bytes": self.total_bytes,
            "available_bytes": self.available,
            "device_bytes": list(self.device_bytes),
            "shards": [vars(shard) for shard in self.shards],
        }

    def __str__(self) -> str:
        lines = [["table", "rows", "device", "bytes"]]
        for shard in sorted(self.shards, key=lambda s: -s.nbytes):
            rows = f"{shard.first_row:,} to {shard.first_row + shard.num_rows:,}"
            device = "every" if self.replicate else str(shard.device)
            lines.append([shard.table, rows, device, f"{shard.nbytes:,}"])
        return f"{text_table(lines)}\n\n{self.summary()}"

    def summary(self) -> str:
        """What it needs, in one sentence."""
        size = f"the packed tables take {readable(self.total_bytes)}"
        if self.replicate:
            return (
                f"{size} and fit into the {readable(self.available)} of 1 device: replicate them on every one of the "
                f"{self.world_size}, no communication"
            )
        return (
            f"{size} and need {self.num_devices} of {self.world_size} devices with {readable(self.available)} each; "
            f"the fullest holds {readable(max(self.device_bytes))}"
        )


def place_packed(precision: PrecisionPlan, available: int, world_size: int) -> PackedPlacement:
    """Place the packed tables of a precision plan on the fewest devices, see :func:`place_tables`."""
    return place_tables(precision.tables, available, world_size, learned_zero_rows=precision.zero_row == "learned")


def place_tables(
    tables: Mapping[str, TableBitWidths | TableCoding], available: int, world_size: int, *, learned_zero_rows: bool
) -> PackedPlacement:
    """Place packed tables on the fewest devices.

    Whole tables, largest first, each on the device with the most room; only where that fails, tables are split into
    ranges of rows. All bytes are exact, directories, scales and padding included.

    Args:
        tables (Mapping[str, TableBitWidths | TableCoding]): bit-widths or coding of every table.
        available (int): bytes that each device has for packed tables.
        world_size (int): devices that there are.
        learned_zero_rows (bool): a table with 0-bit rows stores the vector that they read; a coding says so itself.

    Raises:
        PlannerError: if they are too few, with the bytes of each table and how many would do.
    """

    def size(parts: Mapping[str, _Coding]) -> int:
        return packed_bytes(parts, learned_zero_rows=learned_zero_rows).total

    total = size(tables)

    alone = {name: size({name: widths}) for name, widths in tables.items()}
    if total <= available:
        whole = [_shard(name, 0, 0, tables[name].num_embeddings, tables[name], alone[name]) for name in tables]
        return PackedPlacement(tuple(whole), (total,), total, available, world_size)
    parts = {name: shape_of_rows(widths, 0, _part_rows(widths)) for name, widths in tables.items()}
    if any(size({name: part}) > available for name, part in parts.items()):
        raise _too_few(alone, available, world_size, None)
    fewest = -(-total // available)
    # Each part of a split table has a directory and scales of its own, of a few hundred bytes.
    for devices in range(fewest, fewest + fewest // 4 + 4):
        shards = _place_whole(alone, tables, devices, available) or _split(alone, tables, devices, available, size)
        if shards is None:
            continue
        if devices > world_size:
            raise _too_few(alone, available, world_size, devices)
        loads = tuple(_load([s for s in shards if s.device == device], tables, size) for device in range(devices))
        return PackedPlacement(tuple(shards), loads, total, available, world_size)
    raise _too_few(alone, available, world_size, None)


def _shard(name: str, device: int, start: int, stop: int, widths: _Coding, nbytes: int) -> PackedShard:
    return PackedShard(name, device, start, stop - start, widths.embedding_dim, nbytes)


def _load(
    shards: Sequence[PackedShard],
    tables: Mapping[str, _Coding],
    size: _Size,
) -> int:
    """Exact bytes of the shards of one device, packed together."""
    parts = {}
    for shard in shards:
        widths = tables[shard.table]
        if shard.num_rows < widths.num_embeddings:
            widths = shape_of_rows(widths, shard.first_row, shard.first_row + shard.num_rows)
        parts[f"{shard.table}/{shard.first_row}"] = widths
    return size(parts) if parts else 0


def _largest_first(alone: Mapping[str, int]) -> list[str]:
    return sorted(alone, key=lambda name: -alone[name])


def _place_whole(
    alone: Mapping[str, int], tables: Mapping[str, _Coding], devices: int, available: int
) -> list[PackedShard] | None:
    free = [available] * devices
    shards: list[PackedShard] = []
    for name in _largest_first(alone):
        device = max(range(devices), key=free.__getitem__)
        if alone[name] > free[device]:
            return None
        free[device] -= alone[name]
        shards.append(_shard(name, device, 0, tables[name].num_embeddings, tables[name], alone[name]))
    return shards


def _split(
    alone: Mapping[str, int],
    tables: Mapping[str, _Coding],
    devices: int,
    available: int,
    size: _Size,
) -> list[PackedShard] | None:
    """As :func:`_place_whole`, a table that fits no device being cut; None if even that does not fit."""
    free = [available] * devices
    shards: list[PackedShard] = []
    for name in _largest_first(alone):
        widths = tables[name]
        start, left = 0, widths.num_embeddings
        for device in sorted(range(devices), key=lambda d: -free[d]):
            taken = _rows_that_fit(widths, start, free[device], size) if alone[name] > free[device] else left
            if not left or not taken:
                break
            taken = min(taken, left)
            part = widths if taken == widths.num_embeddings else shape_of_rows(widths, start, start + taken)
            nbytes = size({name: part})
            shards.append(_shard(name, device, start, start + taken, widths, nbytes))
            free[device] -= nbytes
            start, left = start + taken, left - taken
        if left:
            return None
    return shards


def _part_rows(widths: _Coding) -> int:
    return -(-widths.num_embeddings // _PARTS)


def _rows_that_fit(widths: _Coding, start: int, free: int, size: _Size) -> int:
    """The most rows from ``start`` on, in steps of a 256th of the table, that take no more than ``free`` bytes."""
    step = _part_rows(widths)
    left = widths.num_embeddings - start
    low, high = 0, -(-left // step)
    while low < high:
        middle = (low + high + 1) // 2
        fits = size({"part": shape_of_rows(widths, start, start + min(middle * step, left))}) <= free
        low, high = (middle, high) if fits else (low, middle - 1)
    return min(low * step, left)


def _too_few(alone: Mapping[str, int], available: int, world_size: int, devices: int | None) -> PlannerError:
    lines = [["table", "packed bytes"], *([name, f"{alone[name]:,}"] for name in _largest_first(alone))]
    needed = f"{devices} such devices hold them" if devices else "no number of such devices holds them"
    return PlannerError(
        f"the packed tables do not fit into {world_size} devices with {readable(available)} each: {needed}; or take "
        f"tables of fewer bits\n\n{text_table(lines)}",
        PlannerErrorType.INSUFFICIENT_STORAGE,
    )
