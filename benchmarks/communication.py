"""Bytes and messages that a rank hands to collectives in one training step: formulas, and the count that checks them.

    python benchmarks/communication.py             # the formulas for 1 TB of tables on 64 GPUs; at once
    python benchmarks/communication.py --check     # and against what 2 and 4 gloo ranks hand over; half a minute

docs/scaling.md explains the formulas. The counts come from the c10d operators that a real step dispatches, those of
DistributedDataParallel included.
"""

import argparse
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from measure import write_json
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from torchrec_mpe.files.text_table import text_table
from torchrec_mpe.precision.from_frequencies import uniform_precision
from torchrec_mpe.precision.groups import log_rank_bounds

ID_BYTES = LENGTH_BYTES = SPLIT_BYTES = 8  # int64
VALUE_BYTES = 4  # float32
ALL_TO_ALL, REDUCE_SCATTER, ALL_GATHER, ALL_REDUCE = "all-to-all", "reduce-scatter", "all-gather", "all-reduce"
GROUPS_PER_TABLE, CANDIDATES = 12, 7  # the defaults of SearchConfig


@dataclass(frozen=True)
class Table:
    """One table: rows, dimension, features, ids a bag, and into how many shards its columns are cut."""

    rows: int
    dim: int
    features: int = 1
    pooling_factor: int = 1
    column_shards: int = 1


@dataclass(frozen=True)
class Traffic:
    """One collective of a step.

    Attributes:
        what (str): what travels.
        op (str): which collective.
        ranks (int): that take part.
        handed (float): bytes that a rank hands over, its own part included; the mean over all ranks.
    """

    what: str
    op: str
    ranks: int
    handed: float

    @property
    def sent(self) -> float:
        """Bytes that a rank sends to others, for a ring where there is a choice."""
        others = self.ranks - 1
        factor = {ALL_TO_ALL: 1 / self.ranks, REDUCE_SCATTER: 1 / self.ranks, ALL_GATHER: 1, ALL_REDUCE: 2 / self.ranks}
        return self.handed * others * factor[self.op]


def step_traffic(
    tables: Sequence[Table],
    sharding: str,
    ranks: int,
    ranks_per_host: int,
    batch: int,
    phase: str,
    dense_parameters: int,
    training: bool = True,
) -> list[Traffic]:
    """The collectives of one step of a model whose tables are all sharded alike.

    Args:
        tables (Sequence[Table]): the tables.
        sharding (str): one of TorchRec's sharding types.
        ranks, ranks_per_host (int): W and R.
        batch (int): B, examples a rank.
        phase (str): "plain", "search" or "retrain"; "packed" for packed rows, with ``training=False``.
        dense_parameters (int): of the replicated network.
        training (bool): with the backward pass.
    """
    result: list[Traffic] = []
    by_host = sharding in (ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)
    if sharding != ShardingType.DATA_PARALLEL.value:
        slots = sum(t.features * t.column_shards for t in tables)
        ids = sum(t.features * t.column_shards * batch * t.pooling_factor for t in tables)
        row_shards = {ShardingType.ROW_WISE.value: ranks}.get(sharding, ranks_per_host if by_host else 1)
        values = VALUE_BYTES * batch * sum(t.features * t.dim for t in tables)
        # Sizes of lengths and ids, and the batch size.
        result += [
            Traffic("sizes", ALL_TO_ALL, ranks, 3 * SPLIT_BYTES * ranks),
            Traffic("lengths", ALL_TO_ALL, ranks, LENGTH_BYTES * slots * row_shards * batch),
            Traffic("ids", ALL_TO_ALL, ranks, ID_BYTES * ids),
        ]
        if sharding == ShardingType.ROW_WISE.value:
            forward = [Traffic("pooled embeddings", REDUCE_SCATTER, ranks, ranks * values)]
            backward = [Traffic("their gradients", ALL_GATHER, ranks, values)]
        elif by_host:
            hosts = ranks // ranks_per_host
            forward = [
                Traffic("pooled embeddings", REDUCE_SCATTER, ranks_per_host, ranks_per_host * values),
                Traffic("pooled embeddings", ALL_TO_ALL, hosts, values),
            ]
            backward = [
                Traffic("their gradients", ALL_TO_ALL, hosts, values),
                Traffic("their gradients", ALL_GATHER, ranks_per_host, values),
            ]
        else:
            forward = [Traffic("pooled embeddings", ALL_TO_ALL, ranks, values)]
            backward = [Traffic("their gradients", ALL_TO_ALL, ranks, values)]
        result += [*forward, *(backward if training else [])]
    elif training:
        rows = VALUE_BYTES * sum(t.rows * t.dim for t in tables)
        result.append(Traffic("gradients of rows", ALL_REDUCE, ranks, rows))
    if training:
        result.append(Traffic("gradients of the network", ALL_REDUCE, ranks, VALUE_BYTES * dense_parameters))
        if phase in ("search", "retrain"):
            quantizers = VALUE_BYTES * quantizer_parameters(tables, phase)
            result.append(Traffic("gradients of quantizers", ALL_REDUCE, ranks, quantizers))
    return result


def quantizer_parameters(tables: Sequence[Table], phase: str) -> int:
    """Replicated parameters that a phase adds: alpha, beta, a 0-bit vector a table, and in the search gamma."""
    total = 0
    for dim in {t.dim for t in tables}:
        of_dim = [t for t in tables if t.dim == dim]
        total += CANDIDATES + dim + len(of_dim) * dim
        if phase == "search":
            groups = [len(log_rank_bounds(t.rows, GROUPS_PER_TABLE)) - 1 for t in of_dim]
            total += sum(groups) * CANDIDATES
    return total


# By c10d operator: which collective, and which argument is handed over.
_OPERATORS = {
    "alltoall_base_": (ALL_TO_ALL, 1),
    "_reduce_scatter_base_": (REDUCE_SCATTER, 1),
    "_allgather_base_": (ALL_GATHER, 1),
    "allreduce_": (ALL_REDUCE, 0),
}


class CollectiveCounter(TorchDispatchMode):
    """Bytes handed to collectives, by kind, while it is entered; backward passes of this thread included."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            if name not in _OPERATORS:
                raise RuntimeError(f"a step calls the collective {name}, which is not counted")
            kind, position = _OPERATORS[name]
            handed = args[position] if isinstance(args[position], list) else [args[position]]
            # DDP tells by an int32 vector which parameters were used: its size is the number of parameters.
            if not (kind == ALL_REDUCE and handed[0].dtype == torch.int32):
                self.bytes[kind] += sum(t.nbytes for t in handed)
                self.messages[kind] += 1
        return func(*args, **(kwargs or {}))


class Model(nn.Module):
    """Pooled embeddings through one linear layer."""

    def __init__(self, configs: list[EmbeddingBagConfig]) -> None:
        super().__init__()
        self.embeddings = mpe.MPEEmbeddingBagCollection(configs)
        self.linear = nn.Linear(sum(c.embedding_dim * len(c.feature_names) for c in configs), 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        result: Tensor = self.linear(self.embeddings(features).values())
        return result


CHECKED_TABLES = (Table(64, 8, 2, 3, 1), Table(96, 16, 1, 5, 1), Table(40, 16, 1, 2, 1), Table(128, 8, 1, 4, 1))
CHECKED_BATCH = 6
COLUMNS = 4  # of a column shard


def checked_tables(sharding: str) -> list[Table]:
    """The tables of the check, their columns cut as the plan cuts them."""
    types = (ShardingType.COLUMN_WISE, ShardingType.TABLE_COLUMN_WISE, ShardingType.GRID_SHARD)
    cut = sharding in {kind.value for kind in types}
    return [Table(t.rows, t.dim, t.features, t.pooling_factor, t.dim // COLUMNS if cut else 1) for t in CHECKED_TABLES]


def count_one_step(sharding: str, phase: str) -> tuple[dict[str, int], dict[str, int], int]:
    """Bytes and messages of this rank in one real step, by collective, and the network's parameters."""
    configs = [
        EmbeddingBagConfig(
            name=f"t{k}",
            num_embeddings=t.rows,
            embedding_dim=t.dim,
            feature_names=[f"f{k}_{j}" for j in range(t.features)],
        )
        for k, t in enumerate(CHECKED_TABLES)
    ]
    model = Model(configs)
    counts = {c.name: torch.arange(c.num_embeddings, 0, -1) for c in configs}
    if phase == "search":
        mpe.prepare_search_(model, counts)
    elif phase == "retrain":
        widths = uniform_precision(configs, 4)
        mpe.prepare_retrain_(model, replace(widths, candidate_bits=tuple(range(CANDIDATES)), zero_row="learned"))
    constraints = {c.name: ParameterConstraints(sharding_types=[sharding], min_partition=COLUMNS) for c in configs}
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    topology = Topology(world_size=dist.get_world_size(), local_world_size=local, compute_device="cpu", hbm_cap=2**30)
    sharders = mpe.sharders({"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.1})
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids, lengths = [], []
    for t in CHECKED_TABLES:
        for _ in range(t.features):
            ids.append(torch.randint(t.rows, (CHECKED_BATCH * t.pooling_factor,), generator=generator))
            lengths.append(torch.full((CHECKED_BATCH,), t.pooling_factor))
    names = [f for c in configs for f in c.feature_names]
    features = KeyedJaggedTensor.from_lengths_sync(names, torch.cat(ids), torch.cat(lengths))
    dmp(features).sum().backward()  # the first step sets up what later ones reuse
    with CollectiveCounter() as counter:
        dmp(features).sum().backward()
    return dict(counter.bytes), dict(counter.messages), sum(p.numel() for p in model.linear.parameters())


def check(sharding: str, phase: str, ranks: int, ranks_per_host: int, counted: Sequence[Any]) -> list[dict[str, Any]]:
    """Compare what all ranks counted with the formulas, by collective."""
    expected: Counter[str] = Counter()
    traffic = step_traffic(
        checked_tables(sharding), sharding, ranks, ranks_per_host, CHECKED_BATCH, phase, counted[0][2]
    )
    for item in traffic:
        expected[item.op] += round(item.handed * ranks)
    return [
        {
            "case": f"{sharding} {phase} {ranks} ranks {op}",
            "expected": expected[op],
            "counted": sum(of_rank[0].get(op, 0) for of_rank in counted),
            "messages": max(of_rank[1].get(op, 0) for of_rank in counted),
        }
        for op in sorted({*expected, *(op for of_rank in counted for op in of_rank[0])})
    ]


TWO_RANKS = ("table_wise", "row_wise", "column_wise", "data_parallel")
FOUR_RANKS = ("table_wise", "row_wise", "table_row_wise", "table_column_wise", "grid_shard")
PHASES = ("plain", "search", "retrain")


def count_on_this_rank(shardings: Sequence[str]) -> list[tuple[str, str, Any]]:
    """Every sharding type and phase, one step each."""
    return [(sharding, phase, count_one_step(sharding, phase)) for sharding in shardings for phase in PHASES]


def _rank(rank: int, ranks: int, ranks_per_host: int, store: str, shardings: Sequence[str], queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_WORLD_SIZE=str(ranks_per_host), LOCAL_RANK=str(rank % ranks_per_host))
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    queue.put((rank, count_on_this_rank(shardings)))
    dist.barrier()
    dist.destroy_process_group()


def count_on(ranks: int, ranks_per_host: int, shardings: Sequence[str]) -> list[dict[str, Any]]:
    """Start ranks, count on each and compare."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_rank, args=(r, ranks, ranks_per_host, store, shardings, queue), daemon=True)
            for r in range(ranks)
        ]
        for process in processes:
            process.start()
        by_rank = dict(queue.get(timeout=300) for _ in processes)
        for process in processes:
            process.join(timeout=30)
    results: list[dict[str, Any]] = []
    for k, (sharding, phase, _) in enumerate(by_rank[0]):
        results += check(sharding, phase, ranks, ranks_per_host, [by_rank[r][k][2] for r in range(ranks)])
    return results


# One terabyte of fp32 rows: 26 tables of D=128 whose sizes fall by powers, ten ids a bag in half of them.
TERABYTE = [Table(int(7.0e8 / (k + 1) ** 1.2), 128, 1, 10 if k % 2 else 1) for k in range(26)]
TERABYTE_NETWORK = 10_000_000  # parameters


def terabyte(ranks: int = 64, ranks_per_host: int = 8, batch: int = 1024) -> tuple[str, list[dict[str, Any]]]:
    """What the formulas say for a large model, as a table and as records."""
    lines = [["phase", "sharding", "collectives", "handed over", "sent to others", "of which quantizers"]]
    records: list[dict[str, Any]] = []
    for phase in ("plain", "search", "retrain", "packed"):
        for sharding in ("table_wise", "row_wise", "table_row_wise"):
            training = phase != "packed"
            traffic = step_traffic(TERABYTE, sharding, ranks, ranks_per_host, batch, phase, TERABYTE_NETWORK, training)
            sent = sum(t.sent for t in traffic)
            quantizers = sum(t.sent for t in traffic if t.what == "gradients of quantizers")
            handed = sum(t.handed for t in traffic)
            lines.append(
                [phase, sharding, str(len(traffic)), *(f"{b / 1e6:,.2f} MB" for b in (handed, sent, quantizers))]
            )
            records.append(
                {"case": f"1 TB on {ranks} ranks: {phase} {sharding}", "sent": sent, "quantizers": quantizers}
            )
    return text_table(lines), records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="count on 2 and 4 ranks of this machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    size = sum(t.rows * t.dim * VALUE_BYTES for t in TERABYTE)
    table, records = terabyte()
    print(f"{size / 1e12:.2f} TB in {len(TERABYTE)} tables, 64 ranks of 8 a host, 1024 examples a rank: bytes a rank")
    print(table)
    if options.check:
        results = [*count_on(2, 2, TWO_RANKS), *count_on(4, 2, FOUR_RANKS)]
        lines = [["sharding, phase, ranks, collective", "formula", "counted", "messages"]]
        lines += [[r["case"], f"{r['expected']:,}", f"{r['counted']:,}", str(r["messages"])] for r in results]
        print(text_table(lines))
        wrong = [r["case"] for r in results if r["expected"] != r["counted"]]
        print(f"{len(results)} compared, {len(wrong)} differ {wrong or ''}")
        records += [{**r, "ratio": r["counted"] / max(1, r["expected"]), "goal": 1} for r in results]
    if options.json:
        write_json(options.json, records)


if __name__ == "__main__":
    main()
