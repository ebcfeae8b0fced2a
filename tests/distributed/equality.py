"""One model trained for two steps, on any number of ranks: what tests compare."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.distributed import _remote_device
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.distributed.fused_optimizer import RowOptimizer
from torchrec_mpe.precision.from_frequencies import cut_precision
from torchrec_mpe.precision.row_initialization import RowInitialization

LEARNING_RATE = 0.1
EPS = 0.01  # of Adagrad; a small one would make a step of any size out of rounding errors
GLOBAL_BATCH = 8
EVALUATION = 9  # the step whose batch is only evaluated
SHARD_COLUMNS = 4  # columns of a shard of column-wise and grid sharding
INITIALIZATION = RowInitialization(seed=2, std=0.5)

TW, RW, CW, TWRW, TWCW, GRID, DP = (
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
    ShardingType.DATA_PARALLEL.value,
)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        sharding (tuple[str, ...]): sharding type of all four tables, of each of four, or of each of seven.
        phase (str): "plain", "search", "retrain" or "search, then retrain".
        mean (bool): mean pooling of all tables.
        mean_tables (tuple[str, ...]): the tables with mean pooling, if not all.
        weighted (bool): per-sample weights.
        kernel (str): of all tables but data-parallel ones, which are always dense.
        optimizer (EmbOptimType): of the fused kernels; all other parameters are trained by plain SGD.
        gradient_division (bool): of torchrec.distributed.comm_ops.
        int32 (bool): ids and lengths are int32.
        all_on_rank (Optional[int]): the rank that owns every table; the planner chooses if None.
    """

    sharding: tuple[str, ...]
    phase: str = "search"
    mean: bool = False
    weighted: bool = False
    grouping: str = "log_rank"
    zero_row: str = "learned"
    kernel: str = "fused"
    mean_tables: tuple[str, ...] = ()
    optimizer: EmbOptimType = EmbOptimType.EXACT_SGD
    gradient_division: bool = True
    int32: bool = False
    all_on_rank: int | None = None

    def __str__(self) -> str:
        names = {f: getattr(self, f) for f in self.__dataclass_fields__ if getattr(self, f) != getattr(Case(()), f)}
        return " ".join(f"{k}={v.name if isinstance(v, EmbOptimType) else v}" for k, v in names.items())

    def sharding_of(self, table: str) -> str:
        names = [t.name for t in tables(self)]
        return self.sharding[names.index(table)] if len(self.sharding) > 1 else self.sharding[0]

    def kernel_of(self, table: str) -> str:
        return "dense" if self.sharding_of(table) == DP else self.kernel


def tables(case: Case) -> list[EmbeddingBagConfig]:
    """Two dimensions, tables of two features, features in two tables, and in the large model a table of three rows."""
    shapes = [("t0", 40, 8, ["a", "b"]), ("t1", 17, 8, ["c"]), ("t2", 30, 16, ["d"]), ("t3", 21, 16, ["b"])]
    if len(case.sharding) > len(shapes):
        shapes += [("t4", 44, 8, ["a"]), ("t5", 33, 16, ["c", "d"]), ("t6", 3, 8, ["e"])]
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=dim,
            feature_names=features,
            pooling=PoolingType.MEAN if case.mean or name in case.mean_tables else PoolingType.SUM,
        )
        for name, rows, dim, features in shapes
    ]


def embedding_names(case: Case) -> dict[str, int]:
    """Keys of the output in the order of the tables, and their dimensions."""
    of = [(t, feature) for t in tables(case) for feature in t.feature_names]
    features = [feature for _, feature in of]
    return {
        f if features.count(f) == 1 else f"{f}@{t.name}": t.embedding_dim
        for t, f in of
    }  # fmt: skip


def features_of(case: Case) -> dict[str, int]:
    """Features and their number of ids: all fit the smallest table that reads the feature."""
    rows: dict[str, int] = {}
    for table in tables(case):
        for feature in table.feature_names:
            rows[feature] = min(rows.get(feature, table.num_embeddings), table.num_embeddings)
    return dict(sorted(rows.items()))


def global_batch(step: int, case: Case) -> tuple[list[list[list[int]]], list[list[list[float]]], torch.Tensor]:
    """Bags and weights by feature and example, some bags empty, and targets."""
    g = torch.Generator().manual_seed(100 + step)
    bags, weights = [], []
    for rows in features_of(case).values():
        lengths = torch.randint(0, 4, (GLOBAL_BATCH,), generator=g).tolist()
        bags.append([torch.randint(rows, (n,), generator=g).tolist() for n in lengths])
        weights.append([(torch.rand(n, generator=g) + 0.5).tolist() for n in lengths])
    return bags, weights, torch.randn(GLOBAL_BATCH, generator=g)


def local_batch(step: int, case: Case, rank: int, world_size: int) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    bags, weights, targets = global_batch(step, case)
    size = GLOBAL_BATCH // world_size
    mine = slice(rank * size, (rank + 1) * size)
    chosen = [bag for feature in bags for bag in feature[mine]]
    kept = [w for feature in weights for bag in feature[mine] for w in bag]
    dtype = torch.int32 if case.int32 else torch.int64
    return KeyedJaggedTensor.from_lengths_sync(
        list(features_of(case)),
        torch.tensor([i for bag in chosen for i in bag], dtype=dtype),
        torch.tensor([len(bag) for bag in chosen], dtype=dtype),
        torch.tensor(kept, dtype=torch.float32) if case.weighted else None,
    ), targets[mine]


Batch = Callable[[int, Case, int, int], tuple[KeyedJaggedTensor, torch.Tensor]]


class Head(nn.Module):
    """A collection and a linear layer over its output in a fixed order of keys."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.ebc = mpe.MPEEmbeddingBagCollection(tables(case), is_weighted=case.weighted)
        self.keys = list(embedding_names(case))
        generator = torch.Generator().manual_seed(5)
        self.linear = nn.Linear(sum(embedding_names(case).values()), 1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(self.linear.weight.shape, generator=generator))
            self.linear.bias.zero_()

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.ebc(features)
        return self.linear(torch.cat([pooled[k] for k in self.keys], 1)).squeeze(1)


def prepare(model: nn.Module, case: Case) -> nn.Module:
    """Put a model of the case's tables into the case's phase, its quantizers away from their start."""
    g = torch.Generator().manual_seed(1)
    counts = {t.name: torch.randint(0, 50, (t.num_embeddings,), generator=g) for t in tables(case)}
    if case.phase.startswith("search"):
        config = mpe.SearchConfig(
            num_groups=5,
            grouping=case.grouping,  # type: ignore[arg-type]
            zero_row=case.zero_row,  # type: ignore[arg-type]
            temperature=1.0,
            initialization=INITIALIZATION,
        )
        mpe.prepare_search_(model, counts, config)
    elif case.phase == "retrain":
        # At 1 bit many values lie outside the code range, where beta has a gradient.
        plan = cut_precision(counts, tables(case), 1, 0.5, initialization=INITIALIZATION)
        mpe.prepare_retrain_(model, plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mpe." in name:  # away from the start, where beta is 0 and probabilities are uniform
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter += 0.1 * noise if "alpha" not in name else 0.02 * noise.abs()
    return model


def prepared_model(case: Case) -> nn.Module:
    return prepare(Head(case), case)


def enter(model: nn.Module, case: Case) -> None:
    """What happens between sharding and training."""
    if case.phase == "plain":
        mpe.reset_rows_(model, INITIALIZATION)
    elif case.phase == "search, then retrain":
        mpe.prepare_retrain_(model, mpe.sample_precision(model))


def sharding_plan(model: nn.Module, case: Case) -> ShardingPlan:
    """The planner's plan for the case's sharding types, with the case's kernels."""
    constraints = {
        t.name: ParameterConstraints(sharding_types=[case.sharding_of(t.name)], min_partition=SHARD_COLUMNS)
        for t in tables(case)
    }
    topology = Topology(
        world_size=dist.get_world_size(), local_world_size=get_local_size(), compute_device="cpu", hbm_cap=2**30
    )
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(model, mpe.sharders(), dist.GroupMember.WORLD)
    for table, sharding in (item for module in plan.plan.values() for item in module.items()):
        # Set here, because on CPU the planner offers fused kernels only, and none of the UVM ones.
        sharding.compute_kernel = case.kernel_of(table)
        if case.all_on_rank is not None:
            sharding.ranks = [case.all_on_rank]
            sharding.sharding_spec.shards[0].placement = _remote_device(f"rank:{case.all_on_rank}/cpu")
    return plan


def shard(model: nn.Module, case: Case) -> DistributedModelParallel:
    fused_params = {"optimizer": case.optimizer, "learning_rate": LEARNING_RATE, "eps": EPS}
    sharders = mpe.sharders(fused_params)
    plan = sharding_plan(model, case)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def two_steps(
    model: nn.Module,
    case: Case,
    rank: int,
    world_size: int,
    dense: list[nn.Parameter],
    rows: RowOptimizer | None = None,
    batch: Batch = local_batch,
) -> dict[str, Any]:
    """Evaluation, then forward and gradients of the first step, then another.

    Args:
        dense (list[Parameter]): what plain SGD trains.
        rows (Optional[RowOptimizer]): trains the rows of an unsharded collection.
        batch (Callable): features and targets of a rank, from step, case, rank and world size.
    """
    optimizer = torch.optim.SGD(dense, lr=LEARNING_RATE)
    out: dict[str, Any] = {}
    with torch.no_grad():
        out["evaluation"] = model.eval()(batch(EVALUATION, case, rank, world_size)[0]).numpy()
    model.train()
    for step in range(2):
        features, targets = batch(step, case, rank, world_size)
        predictions = model(features)
        loss = ((predictions - targets) ** 2).mean()
        if case.phase == "search":
            loss = loss + 10 * mpe.bit_penalty(model)
        model.zero_grad()
        loss.backward()
        if step == 0:
            out["forward"] = predictions.detach().numpy()
            out["gradients"] = {
                name.removeprefix("_dmp_wrapped_module.").removeprefix("module."): p.grad.numpy().copy()
                for name, p in model.named_parameters()
                if p.grad is not None and ("mpe." in name or "linear." in name)
            }
        optimizer.step()
        if rows is not None:
            rows.step()
    return out


def on_ranks(cases: list[Case], batch: Batch = local_batch) -> list[dict[str, Any]]:
    """Every case under DistributedModelParallel on this group; rows of all shards, put together by the caller."""
    results = []
    for case in cases:
        try:
            results.append(_on_ranks(case, batch))
        except Exception:  # told by the case's own test
            results.append({"error": traceback.format_exc()})
    return results


def _on_ranks(case: Case, batch: Batch) -> dict[str, Any]:
    set_gradient_division(case.gradient_division)
    try:
        model = shard(prepared_model(case), case)
        enter(model, case)
        dense = [p for _, p in in_backward_optimizer_filter(model.named_parameters())]
        result = two_steps(model, case, dist.get_rank(), dist.get_world_size(), dense, batch=batch)
    finally:
        set_gradient_division(True)
    sharded = model.module.ebc
    result["shards"] = [(t, r, c, values.detach().numpy().copy()) for t, r, c, values in sharded.local_shards()]
    result["optimizer"] = {}
    for kernel in sharded.kernels() if case.optimizer != EmbOptimType.EXACT_SGD else ():
        if case.kernel_of(kernel.config.embedding_tables[0].name) == "dense":
            continue
        states = kernel.emb_module.split_optimizer_states()
        for table, (state,) in zip(kernel.config.embedding_tables, states, strict=True):
            row, column = table.local_metadata.shard_offsets
            result["optimizer"][table.name, row, column] = state.numpy().copy()
    return result


def assert_equal(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """That results of :func:`on_ranks`, one a rank, are those of :func:`in_one_process`."""
    for number, rank in enumerate(ranks):
        assert "error" not in rank, f"rank {number}: {rank['error']}"
        assert set(rank["gradients"]) == set(expected["gradients"])
    for what in ("evaluation", "forward"):
        values = np.concatenate([rank[what] for rank in ranks])
        np.testing.assert_allclose(values, expected[what], rtol=0, atol=6e-6, err_msg=what)
    for name, gradient in expected["gradients"].items():
        scale = np.abs(gradient).max() + 1e-12
        for rank in ranks:
            error = np.abs(rank["gradients"][name] - gradient).max() / scale
            assert error < 2e-5, f"gradient of {name} is off by {error:.1e} of its largest value"
    for rank in ranks:
        for table, row, column, values in rank["shards"]:
            part = np.s_[row : row + values.shape[0], column : column + values.shape[1]]
            np.testing.assert_allclose(values, expected["rows"][table][part], rtol=0, atol=1e-5, err_msg=table)
        for (table, row, column), state in rank["optimizer"].items():
            want = expected["optimizer"][table, column].numpy()
            want = want[row : row + len(state)].reshape(state.shape)
            np.testing.assert_allclose(state, want, rtol=1e-4, atol=1e-7, err_msg=f"optimizer state of {table}")


def on_two_ranks_emitted(case: Case) -> dict[str, Any]:
    """The packed buffers that a sharded model emits before any training."""
    return packed_buffers(shard(prepared_model(case), case))


def packed_buffers(model: nn.Module) -> dict[str, Any]:
    emitted = mpe.emit_inference_model(model)
    return {name: buffer.view(torch.uint8).numpy() for name, buffer in emitted.ebc.named_buffers()}


def in_one_process(case: Case, emit: bool = False, world_size: int = 2, batch: Batch = local_batch) -> dict[str, Any]:
    """The unsharded model over the whole batch.

    With gradient division off, TorchRec's rows see the sum of the ranks' gradients instead of their mean, and so
    ``world_size`` times the gradient; all replicated parameters see the mean as ever.
    """
    model = prepared_model(case)
    enter(model, case)
    if emit:
        return {"packed": packed_buffers(model)}
    rows = {t.name: model.ebc.embedding_bags[t.name].weight for t in tables(case)}
    of_rows = {id(weight) for weight in rows.values()}
    dense = [p for p in model.parameters() if id(p) not in of_rows]
    optimizer = RowOptimizer(LEARNING_RATE, EPS)
    for name, weight in rows.items():
        kind = case.sharding_of(name)
        optimizer.add(
            name,
            weight,
            case.optimizer if case.kernel_of(name).startswith("fused") else EmbOptimType.EXACT_SGD,
            SHARD_COLUMNS if kind in (CW, TWCW, GRID) else weight.shape[1],
            world_size if kind != DP and not case.gradient_division else 1,
        )
    result = two_steps(model, case, 0, 1, dense, optimizer, batch)
    result["rows"] = {name: weight.detach().numpy() for name, weight in rows.items()}
    result["optimizer"] = optimizer.state
    return result
