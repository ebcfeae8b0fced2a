"""A small training run that can stop at a step and go on, on any number of ranks: what checkpoint tests compare."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from torchrec_mpe.distributed.checkpoint.checkpoint import Checkpoint
from torchrec_mpe.distributed.checkpoint.checkpoints import Checkpoints
from torchrec_mpe.precision.from_frequencies import cut_precision
from torchrec_mpe.precision.row_initialization import RowInitialization

TW, RW, CW, DP = (
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.DATA_PARALLEL.value,
)
ROWWISE, ELEMENTWISE, NONE = EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_SGD
TABLES = (("t0", 24, 8), ("t1", 15, 8), ("t2", 10, 16))
GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Run:
    """Phase and sharding of one run; a sharding type per table, or one for all."""

    phase: str = "search"
    sharding: tuple[str, ...] = (TW,)
    optimizer: EmbOptimType = ROWWISE
    kernel: str = "fused"
    tables: tuple[tuple[str, int, int], ...] = field(default=TABLES, repr=False)

    def __str__(self) -> str:
        return f"{self.phase}: {', '.join(self.sharding)}; {self.optimizer.value}, {self.kernel}"

    def types(self) -> tuple[str, ...]:
        return self.sharding * len(self.tables) if len(self.sharding) == 1 else self.sharding


def configs(run: Run) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[f"f_{name}"])
        for name, rows, dim in run.tables
    ]


def counts(run: Run, seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randint(0, 50, (rows,), generator=g) for name, rows, _ in run.tables}


def plan(run: Run, fraction: float = 0.5) -> mpe.PrecisionPlan:
    return cut_precision(counts(run), configs(run), 2, fraction, initialization=INITIALIZATION)


INITIALIZATION = RowInitialization(seed=3, std=0.3)
CONFIG = mpe.SearchConfig(num_groups=4, temperature=0.5, candidate_bits=(0, 1, 2, 4), initialization=INITIALIZATION)


class Model(nn.Module):
    """A collection, dropout (which draws random numbers), batch normalization (which has buffers) and a layer."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.ebc = mpe.MPEEmbeddingBagCollection(configs(run))
        self.keys = [f"f_{name}" for name, *_ in run.tables]
        width = sum(dim for *_, dim in run.tables)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(width, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.ebc(features)
        hidden = self.dropout(self.norm(torch.cat([pooled[key] for key in self.keys], 1)))
        logits: torch.Tensor = self.linear(hidden).squeeze(1)
        return logits


def prepared(run: Run) -> nn.Module:
    torch.manual_seed(9)
    model = Model(run)
    if run.phase == "search":
        mpe.prepare_search_(model, counts(run), CONFIG)
    elif run.phase == "retrain":
        mpe.prepare_retrain_(model, plan(run))
    return model


def shard(model: nn.Module, run: Run) -> DistributedModelParallel:
    constraints = {
        config.name: ParameterConstraints(sharding_types=[kind], min_partition=4)
        for config, kind in zip(configs(run), run.types(), strict=True)
    }
    sharders = mpe.sharders({"optimizer": run.optimizer, "learning_rate": 0.1})
    topology = Topology(
        world_size=dist.get_world_size(), local_world_size=dist.get_world_size(), compute_device="cpu", hbm_cap=2**30
    )
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    sharding_plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    for sharding in (s for module in sharding_plan.plan.values() for s in module.values()):
        # Set here: on CPU the planner offers fused kernels only.
        sharding.compute_kernel = "dense" if sharding.sharding_type == DP else run.kernel
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=sharding_plan, sharders=sharders)


def dense_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    named = list(in_backward_optimizer_filter(model.named_parameters()))
    quantizers = [p for name, p in named if ".mpe." in f".{name}"]
    others = [p for name, p in named if ".mpe." not in f".{name}"]
    return torch.optim.Adam(
        [{"params": others, "lr": 0.05}, *([{"params": quantizers, "lr": 0.02}] if quantizers else [])]
    )


def batch(step: int, run: Run) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """This rank's part of the global batch of a step."""
    g = torch.Generator().manual_seed(1000 + step)
    size = GLOBAL_BATCH // dist.get_world_size()
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    bags: list[list[int]] = []
    for _, rows, _ in run.tables:
        lengths = torch.randint(0, 4, (GLOBAL_BATCH,), generator=g).tolist()
        bags += [torch.randint(rows, (n,), generator=g).tolist() for n in lengths][mine]
    features = KeyedJaggedTensor.from_lengths_sync(
        [f"f_{name}" for name, *_ in run.tables],
        torch.tensor([i for bag in bags for i in bag], dtype=torch.int64),
        torch.tensor([len(bag) for bag in bags]),
    )
    return features, (torch.rand(GLOBAL_BATCH, generator=g) > 0.5).float()[mine]


class Training:
    """A sharded model, its dense optimizer and a learning-rate schedule."""

    def __init__(self, run: Run, model: nn.Module | None = None) -> None:
        self.run = run
        self.model = shard(prepared(run) if model is None else model, run)
        if run.phase == "plain":
            mpe.reset_rows_(self.model, INITIALIZATION)
        self.start()
        torch.manual_seed(77 + dist.get_rank())

    def start(self) -> None:
        self.optimizer = dense_optimizer(self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            features, labels = batch(step, self.run)
            loss = nn.functional.binary_cross_entropy_with_logits(self.model(features), labels)
            losses.append(float(loss.detach()))
            if self.run.phase == "search":
                loss = loss + mpe.bit_penalty(self.model)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
        return losses

    def save(self, checkpoints: Checkpoints, step: int, **more: Any) -> None:
        given = {"counts": counts(self.run)} if self.run.phase == "search" else {"plan": plan(self.run)}
        given = {} if self.run.phase == "plain" else given
        position = {"epoch": 0, "batch": step}
        extra = {"schedule": self.schedule}
        checkpoints.save(
            self.model, self.optimizer, **{"step": step, "position": position, "extra": extra, **given, **more}
        )

    def load(self, checkpoints: Checkpoints, found: Checkpoint, **more: Any) -> None:
        checkpoints.load(self.model, self.optimizer, found, extra={"schedule": self.schedule}, **more)

    def state(self) -> dict[str, Any]:
        """This rank's whole state as arrays, read from TBEs and modules and not from any state dict."""
        ebc = self.model.module.ebc
        out: dict[str, Any] = {}
        for table, row, column, values in ebc.local_shards():
            out[f"rows/{table}/{row}/{column}"] = values.detach().numpy().copy()
        for kernel in ebc.kernels():
            if not hasattr(kernel.emb_module, "split_optimizer_states"):
                continue
            for table, states in zip(
                kernel.config.embedding_tables, kernel.emb_module.split_optimizer_states(), strict=False
            ):
                row, column = table.local_metadata.shard_offsets
                for k, state in enumerate(states):
                    out[f"fused{k}/{table.name}/{row}/{column}"] = state.numpy().copy()
                out[f"iter/{table.name}"] = int(kernel.emb_module.iter)
                out[f"lr/{table.name}"] = kernel.emb_module.get_learning_rate()
        for name, parameter in self.model.named_parameters():
            if "embedding_bags" not in name:
                out[f"dense/{name}"] = parameter.detach().numpy().copy()
                for key, value in self.optimizer.state[parameter].items():
                    out[f"adam/{name}/{key}"] = value.numpy().copy()
        for name, buffer in self.model.module.norm.named_buffers():
            out[f"norm/{name}"] = buffer.numpy().copy()
        out["groups"] = [
            {k: v for k, v in group.items() if k != "params"} for group in self.optimizer.state_dict()["param_groups"]
        ]
        out["schedule"] = {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"}
        out["rng"] = torch.get_rng_state().numpy().copy()
        return out


def whole(states: list[dict[str, Any]], kind: str) -> dict[str, np.ndarray]:
    """Tables put together from the shards of all ranks: of rows, or of fused optimizer state of number k."""
    parts: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    for state in states:
        for key, values in state.items():
            if key.startswith(f"{kind}/"):
                _, table, row, column = key.split("/")
                parts.setdefault(table, {})[int(row), int(column)] = values  # a copy a rank if data-parallel
    out: dict[str, np.ndarray] = {}
    for table, shards in parts.items():
        columns = sorted({column for _, column in shards})
        blocks = [np.concatenate([shards[key] for key in sorted(shards) if key[1] == column]) for column in columns]
        out[table] = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=blocks[0].ndim - 1)
    return out


def equal(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """Names of what differs."""
    for key in sorted({*a, *b}):
        if key not in a or key not in b:
            yield key
        elif isinstance(a[key], np.ndarray):
            if a[key].dtype != b[key].dtype or not np.array_equal(a[key], b[key]):
                yield key
        elif a[key] != b[key]:
            yield key


def train_and_save(cases: list[tuple[str, Run]], at: int, until: int) -> list[dict[str, Any]]:
    """Per case, the state at the save, then losses and state after going on."""
    results = []
    for folder, run in cases:
        training = start(run)
        first = training.steps(0, at)
        training.save(Checkpoints(folder), at)
        results.append({"first": first, "saved": training.state()})
        results[-1]["losses"] = training.steps(at, until)
        results[-1]["end"] = training.state()
    return results


def load_and_train(cases: list[tuple[str, Run, Any]], at: int, until: int) -> list[dict[str, Any]]:
    """Per case, the state of a fresh run after loading, then losses and state after going on; or what was said."""
    results = []
    for folder, run, optimizer_state in cases:
        checkpoints = Checkpoints(folder)
        found = checkpoints.newest()
        assert found is not None and found.step == at and found.position == {"epoch": 0, "batch": at}
        training = Training(run, found.prepare_(Model(run)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                training.load(checkpoints, found, optimizer_state=optimizer_state)
            except ValueError as error:
                results.append({"error": str(error), "saved": training.state()})
                continue
        results.append({"saved": training.state(), "warnings": [str(w.message) for w in caught]})
        results[-1]["losses"] = training.steps(at, until)
        results[-1]["end"] = training.state()
    return results


def start(run: Run) -> Training:
    """A run from its start; "search, then retrain" has its search behind it."""
    if run.phase != "retrain in place":
        return Training(run)
    training = Training(replace(run, phase="search"))
    training.steps(0, 2)
    mpe.prepare_retrain_(training.model, plan(run))
    training.run = run
    training.start()
    return training
