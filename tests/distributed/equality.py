"""One model trained for two steps, on any number of ranks: what tests compare."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe

LEARNING_RATE = 0.1
GLOBAL_BATCH = 8
FEATURES = ["a", "b", "c", "d"]


@dataclass(frozen=True)
class Case:
    """One comparison: sharding type of each table (or one for all), phase, pooling and weights."""

    sharding: tuple[str, ...]
    phase: str = "search"
    mean: bool = False
    weighted: bool = False
    grouping: str = "log_rank"
    zero_row: str = "learned"
    kernel: str = "fused"


def tables(case: Case) -> list[EmbeddingBagConfig]:
    """Two dimensions, a table of two features, and feature b in two tables."""
    pooling = PoolingType.MEAN if case.mean else PoolingType.SUM
    shapes = (("t0", 40, 8, ["a", "b"]), ("t1", 17, 8, ["c"]), ("t2", 30, 16, ["d"]), ("t3", 21, 16, ["b"]))
    return [
        EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=d, feature_names=f, pooling=pooling)
        for n, r, d, f in shapes
    ]


def global_batch(step: int, weighted: bool) -> tuple[list[list[list[int]]], list[list[list[float]]], torch.Tensor]:
    """Bags and weights by feature and example, some bags empty, and targets."""
    g = torch.Generator().manual_seed(100 + step)
    rows = {"a": 40, "b": 21, "c": 17, "d": 30}
    bags, weights = [], []
    for feature in FEATURES:
        lengths = torch.randint(0, 4, (GLOBAL_BATCH,), generator=g).tolist()
        bags.append([torch.randint(rows[feature], (n,), generator=g).tolist() for n in lengths])
        weights.append([(torch.rand(n, generator=g) + 0.5).tolist() for n in lengths])
    return bags, weights, torch.randn(GLOBAL_BATCH, generator=g)


def local_batch(step: int, case: Case, rank: int, world_size: int) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    bags, weights, targets = global_batch(step, case.weighted)
    size = GLOBAL_BATCH // world_size
    mine = slice(rank * size, (rank + 1) * size)
    chosen = [bag for feature in bags for bag in feature[mine]]
    kept = [w for feature in weights for bag in feature[mine] for w in bag]
    return KeyedJaggedTensor.from_lengths_sync(
        FEATURES,
        torch.tensor([i for bag in chosen for i in bag], dtype=torch.int64),
        torch.tensor([len(bag) for bag in chosen]),
        torch.tensor(kept, dtype=torch.float32) if case.weighted else None,
    ), targets[mine]


class Head(nn.Module):
    """A collection and a linear layer over its output in a fixed order of keys."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.ebc = mpe.MPEEmbeddingBagCollection(tables(case), is_weighted=case.weighted)
        generator = torch.Generator().manual_seed(5)
        self.linear = nn.Linear(8 * 3 + 16 * 2, 1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(self.linear.weight.shape, generator=generator))
            self.linear.bias.zero_()

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.ebc(features)
        keys = ["a", "b@t0", "c", "d", "b@t3"]
        return self.linear(torch.cat([pooled[k] for k in keys], 1)).squeeze(1)


def prepared_model(case: Case) -> nn.Module:
    model = Head(case)
    g = torch.Generator().manual_seed(1)
    counts = {t.name: torch.randint(0, 50, (t.num_embeddings,), generator=g) for t in tables(case)}
    init = INITIALIZATION
    if case.phase.startswith("search"):
        config = mpe.SearchConfig(
            num_groups=5,
            grouping=case.grouping,  # type: ignore[arg-type]
            zero_row=case.zero_row,  # type: ignore[arg-type]
            temperature=1.0,
            initialization=init,
        )
        mpe.prepare_search_(model, counts, config)
    elif case.phase == "retrain":
        # At 1 bit many values lie outside the code range, where beta has a gradient.
        plan = mpe.cut_precision(counts, tables(case), 1, 0.5, initialization=init)
        mpe.prepare_retrain_(model, plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mpe." in name:  # away from the start, where beta is 0 and probabilities are uniform
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter += 0.1 * noise if "alpha" not in name else 0.02 * noise.abs()
    return model


INITIALIZATION = mpe.RowInitialization(seed=2, std=0.5)


def enter(model: nn.Module, case: Case) -> None:
    """What happens between sharding and training."""
    if case.phase == "plain":
        mpe.reset_rows_(model, INITIALIZATION)
    elif case.phase == "search, then retrain":
        mpe.prepare_retrain_(model, mpe.sample_precision(model))


def shard(model: nn.Module, case: Case) -> DistributedModelParallel:
    names = [t.name for t in tables(case)]
    types = case.sharding if len(case.sharding) > 1 else case.sharding * len(names)
    constraints = {
        name: ParameterConstraints(sharding_types=[kind], compute_kernels=[case.kernel])
        for name, kind in zip(names, types, strict=True)
    }
    sharders = mpe.sharders({"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": LEARNING_RATE})
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def two_steps(model: nn.Module, case: Case, rank: int, world_size: int, dense: list[nn.Parameter]) -> dict[str, Any]:
    """Forward and gradients of the first step, then another."""
    optimizer = torch.optim.SGD(dense, lr=LEARNING_RATE)
    out: dict[str, Any] = {}
    for step in range(2):
        features, targets = local_batch(step, case, rank, world_size)
        predictions = model(features)
        loss = ((predictions - targets) ** 2).mean()
        if case.phase == "search":
            loss = loss + 10 * mpe.bit_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            out["forward"] = predictions.detach().numpy()
            out["gradients"] = {
                name.removeprefix("_dmp_wrapped_module.").removeprefix("module."): p.grad.numpy().copy()
                for name, p in model.named_parameters()
                if p.grad is not None and ("mpe." in name or "linear." in name)
            }
        optimizer.step()
    return out


def on_ranks(cases: list[Case]) -> list[dict[str, Any]]:
    """Every case under DistributedModelParallel on this group; rows of all shards, put together by the caller."""
    results = []
    for case in cases:
        model = shard(prepared_model(case), case)
        enter(model, case)
        kernel_parameters = {EmbeddingComputeKernel.FUSED.value: ("mpe.", "linear.")}
        wanted = kernel_parameters.get(case.kernel, ("",))
        dense = [p for name, p in model.named_parameters() if any(w in name for w in wanted)]
        result = two_steps(model, case, dist.get_rank(), dist.get_world_size(), dense)
        sharded = model.module.ebc
        result["shards"] = [(t, r, c, values.detach().numpy().copy()) for t, r, c, values in sharded.local_shards()]
        results.append(result)
    return results


def on_two_ranks_emitted(case: Case) -> dict[str, Any]:
    """The packed buffers that a sharded model emits before any training."""
    return packed_buffers(shard(prepared_model(case), case))


def packed_buffers(model: nn.Module) -> dict[str, Any]:
    emitted = mpe.emit_inference_model(model)
    return {name: buffer.numpy() for name, buffer in emitted.ebc.named_buffers()}


def in_one_process(case: Case, emit: bool = False) -> dict[str, Any]:
    """The unsharded model over the whole batch, all parameters under plain SGD."""
    model = prepared_model(case)
    enter(model, case)
    if emit:
        return {"packed": packed_buffers(model)}
    result = two_steps(model, case, 0, 1, list(model.parameters()))
    result["rows"] = {t.name: model.ebc.embedding_bags[t.name].weight.detach().numpy() for t in tables(case)}
    return result


def shard_with_counts_of_its_own() -> str:
    """What sharding says if a rank forgot to merge its counts."""
    case = Case((TW,))
    model = Head(case)
    g = torch.Generator().manual_seed(dist.get_rank())
    counts = {t.name: torch.randint(0, 50, (t.num_embeddings,), generator=g) for t in tables(case)}
    mpe.prepare_search_(model, counts, mpe.SearchConfig(num_groups=5))
    try:
        shard(model, case)
    except ValueError as error:
        return str(error)
    return ""


def merged_counts() -> list[int]:
    counter = mpe.FrequencyCounter.from_counts({"t": torch.tensor([1, 2, 3]) + dist.get_rank()})
    counts: list[int] = counter.merge_across_ranks()["t"].tolist()
    return counts


TW, RW, CW, DP = (
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.DATA_PARALLEL.value,
)
CASES = [
    Case((TW,)),
    Case((RW,)),
    Case((TW, RW, RW, TW)),
    Case((TW,), phase="retrain"),
    Case((RW,), phase="retrain"),
    Case((TW,), mean=True),
    Case((RW,), mean=True),
    Case((TW,), weighted=True),
    Case((RW,), weighted=True, phase="retrain"),
    Case((RW,), grouping="paper", zero_row="zero"),
    Case((TW, RW, RW, TW), phase="search, then retrain"),
    Case((CW,)),
    Case((CW,), phase="retrain"),
    Case((DP,), kernel="dense"),
    Case((DP,), kernel="dense", phase="retrain", mean=True),
    Case((TW,), phase="plain"),
    Case((RW,), phase="plain"),
]
