"""What a sharding plan puts where, in bytes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrec.distributed.planner.types import ShardingOption, Topology

from torchrec_mpe.distributed.planner.shard_bytes import ShardBytes
from torchrec_mpe.files.text_table import text_table

_KINDS = {
    "rows": "rows",
    "store": "store",
    "cache": "cache",
    "spill": "spill",
    "directory": "directory",
    "optimizer_state": "optimizer",
    "row_map": "row map",
    "row_counts": "counts",
    "inputs_outputs": "in/out",
    "activations": "activations",
    "gradients": "gradients",
    "frequency_order": "order (host)",
}


@dataclass(frozen=True)
class TableReport:
    """One table in a plan.

    Attributes:
        name (str): table.
        num_embeddings (int): rows.
        embedding_dim (int): elements of a row.
        sharding_type (str): a ShardingType's value.
        compute_kernel (str): an EmbeddingComputeKernel's value.
        ranks (tuple[Optional[int], ...]): the rank of each shard.
        by_kind (Mapping[str, int]): bytes of all shards by attribute name of ShardBytes.
        device_bytes (int): of all shards, on devices.
        host_bytes (int): of all shards, in host memory.
        largest_shard (int): device bytes of the largest shard.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    sharding_type: str
    compute_kernel: str
    ranks: tuple[int | None, ...]
    by_kind: Mapping[str, int]
    device_bytes: int
    host_bytes: int
    largest_shard: int

    @classmethod
    def of(cls, option: ShardingOption, shards: Sequence[ShardBytes]) -> "TableReport":
        """The report of a chosen option and the bytes of its shards."""
        by_kind: Counter[str] = Counter()
        for shard in shards:
            by_kind.update(shard.by_kind())
        rows, columns = option.tensor.shape
        return cls(
            name=option.name,
            num_embeddings=rows,
            embedding_dim=columns,
            sharding_type=option.sharding_type,
            compute_kernel=option.compute_kernel,
            ranks=tuple(shard.rank for shard in option.shards),
            by_kind=dict(by_kind),
            device_bytes=sum(shard.device for shard in shards),
            host_bytes=sum(shard.host for shard in shards),
            largest_shard=max((shard.device for shard in shards), default=0),
        )


@dataclass(frozen=True)
class PlanReport:
    """The tables of a plan, and the load of every device.

    Attributes:
        tables (tuple[TableReport, ...]): largest first.
        device_bytes (tuple[int, ...]): of embedding shards, by rank; on CPU what is in host memory included.
        host_bytes (tuple[int, ...]): in host memory beside a device, by rank.
        available (tuple[int, ...]): device bytes by rank that the storage reservation left for shards.
        step_ms (tuple[float, ...]): estimated time of all shards' lookups and communication a step, by rank.
    """

    tables: tuple[TableReport, ...]
    device_bytes: tuple[int, ...]
    host_bytes: tuple[int, ...]
    available: tuple[int, ...]
    step_ms: tuple[float, ...]

    @classmethod
    def of(
        cls,
        options: Sequence[ShardingOption],
        shards: Sequence[Sequence[ShardBytes]],
        reserved: Topology,
    ) -> "PlanReport":
        """The report of a plan's options, the bytes of their shards, and the topology less what is reserved."""
        world_size = reserved.world_size
        cpu = reserved.compute_device == "cpu"
        device, host, time = [0] * world_size, [0] * world_size, [0.0] * world_size
        for option, held in zip(options, shards, strict=True):
            for shard, bytes_of_shard in zip(option.shards, held, strict=True):
                # A CPU's memory is the host's.
                device[shard.rank] += bytes_of_shard.total if cpu else bytes_of_shard.device
                host[shard.rank] += 0 if cpu else bytes_of_shard.host
                time[shard.rank] += shard.perf.total
        tables = [TableReport.of(option, held) for option, held in zip(options, shards, strict=True)]
        return cls(
            tables=tuple(sorted(tables, key=lambda table: -table.device_bytes)),
            device_bytes=tuple(device),
            host_bytes=tuple(host),
            available=tuple(d.storage.ddr if cpu else d.storage.hbm for d in reserved.devices),
            step_ms=tuple(time),
        )

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings only, for JSON."""
        return {
            "tables": [{**vars(t), "ranks": list(t.ranks), "by_kind": dict(t.by_kind)} for t in self.tables],
            "device_bytes": list(self.device_bytes),
            "host_bytes": list(self.host_bytes),
            "available_device_bytes": list(self.available),
            "step_ms": [round(ms, 6) for ms in self.step_ms],
        }

    def __str__(self) -> str:
        world_size = len(self.device_bytes)
        lines = [
            table_of_bytes(self.tables),
            "",
            f"device memory for tables: max {readable(max(self.device_bytes))}, "
            f"mean {readable(sum(self.device_bytes) / world_size)}, {readable(min(self.available))} available on each "
            f"of {world_size} devices",
        ]
        if any(self.host_bytes):
            lines.append(f"host memory for tables: max {readable(max(self.host_bytes))} a rank")
        lines.append(f"estimated embedding time of the slowest rank: {max(self.step_ms):.3g} ms a step")
        return "\n".join(lines)


def table_of_bytes(tables: Sequence[TableReport]) -> str:
    """The tables with their bytes by kind, as text; kinds of which there are none are left out."""
    kinds = [kind for kind in _KINDS if any(table.by_kind[kind] for table in tables)]
    lines = [["table", "rows", "dim", "sharding", "ranks", *(_KINDS[kind] for kind in kinds), "total"]]
    for table in tables:
        kernel = "" if table.compute_kernel == "fused" else f"/{table.compute_kernel}"
        lines.append(
            [
                table.name,
                f"{table.num_embeddings:,}",
                str(table.embedding_dim),
                table.sharding_type + kernel,
                _ranges(table.ranks),
                *(readable(table.by_kind[kind]) for kind in kinds),
                readable(table.device_bytes + table.host_bytes),
            ]
        )
    totals = (readable(sum(table.by_kind[kind] for table in tables)) for kind in kinds)
    total = sum(table.device_bytes + table.host_bytes for table in tables)
    rows = sum(table.num_embeddings for table in tables)
    lines.append(["all", f"{rows:,}", "", "", "", *totals, readable(total)])
    return text_table(lines)


def readable(count: float) -> str:
    """Bytes in decimal units, ``1.25 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1000
    raise AssertionError


def _ranges(ranks: Sequence[int | None]) -> str:
    """``0-7,9`` of increasing or other ranks; empty where none is assigned."""
    numbers = sorted({rank for rank in ranks if rank is not None and rank >= 0})
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in parts]
    return ",".join(shown[:4]) + (",..." if len(shown) > 4 else "")
