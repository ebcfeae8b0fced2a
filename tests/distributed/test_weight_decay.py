"""Weight decay and clipping of fused optimizers against their formulas, and what FBGEMM would leave out, refused."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.distributed.checkpoint.runs import CONFIG, INITIALIZATION, Run, batch, configs, counts, plan
from torchrec_mpe.app.training.process_group import process_group

RUN = Run("search")
ROWWISE, ADAGRAD, SGD = EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_SGD
RATE, EPS, LIMIT = 0.1, 1e-8, 0.05


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with process_group(torch.device("cpu")):
        yield


@dataclass(frozen=True)
class Formula:
    """An optimizer's step on looked-up rows; ``clip`` is of each lookup's gradient."""

    optimizer: EmbOptimType = ROWWISE
    l2: float = 0
    decoupled: float = 0
    clip: float = 0

    def fused(self) -> dict[str, Any]:
        out: dict[str, Any] = {"optimizer": self.optimizer, "learning_rate": RATE, "eps": EPS}
        if self.l2 or self.decoupled:
            mode = WeightDecayMode.L2 if self.l2 else WeightDecayMode.DECOUPLE
            out.update(weight_decay=self.l2 or self.decoupled, weight_decay_mode=mode)
        if self.clip:
            out.update(gradient_clipping=True, max_gradient=self.clip)
        return out

    def step(self, rows: Tensor, gradient: Tensor, state: Tensor) -> None:
        gradient = gradient + self.l2 * rows
        step = gradient
        if self.optimizer != SGD:
            squares = gradient**2
            state += squares.mean(1, keepdim=True) if self.optimizer == ROWWISE else squares
            step = gradient / (state.sqrt() + EPS)
        rows.copy_(rows * (1 - RATE * self.decoupled) - RATE * step)


FORMULAS = [
    Formula(),
    Formula(l2=0.5),
    Formula(decoupled=0.5),
    *(Formula(optimizer, clip=LIMIT) for optimizer in (ROWWISE, ADAGRAD, SGD)),
    Formula(l2=0.5, clip=LIMIT),
]


def prepared(collection: type[mpe.MPEEmbeddingBagCollection], phase: str, **arguments: Any) -> Any:
    model = nn.ModuleDict({"ebc": collection(configs(RUN), **arguments)})
    if phase == "search":
        mpe.prepare_search_(model, counts(RUN), CONFIG)
    elif phase == "retrain":
        mpe.prepare_retrain_(model, plan(RUN))
    return model


def shard(model: nn.Module, fused: dict[str, Any]) -> Any:
    sharders = mpe.sharders(fused)
    planner = mpe.MPEShardingPlanner(topology=Topology(world_size=1, compute_device="cpu"), batch_size=8)
    sharding = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=sharding, sharders=sharders)


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
@pytest.mark.parametrize("phase", ["search", "retrain"])
def test_prepared_phases_decay_and_clip_as_the_formulas_say(phase: str, formula: Formula) -> None:
    plain = prepared(mpe.MPEEmbeddingBagCollection, phase)
    sharded = shard(copy.deepcopy(plain), formula.fused())
    state = {t.name: torch.zeros(t.num_embeddings, t.embedding_dim) for t in configs(RUN)}
    bags = plain["ebc"].embedding_bags
    before = {name: bag.weight.detach().clone() for name, bag in bags.items()}
    for step in range(3):
        features, _ = batch(step, RUN)
        (sharded.module["ebc"](features).values() ** 2).sum().backward()
        gradients = gradients_of_lookups(plain["ebc"], features)
        for table in configs(RUN):
            weight, gradient = bags[table.name].weight.data, gradients[table.name]
            if formula.clip:
                assert (gradient.abs() > formula.clip).any()
                gradient = gradient.clamp(-formula.clip, formula.clip)
            ids = features[table.feature_names[0]].values()
            total, seen = torch.zeros_like(weight).index_add_(0, ids, gradient), ids.unique()
            rows, of_rows = weight[seen], state[table.name][seen]
            formula.step(rows, total[seen], of_rows)
            weight[seen], state[table.name][seen] = rows, of_rows
    for part in sharded.module["ebc"].shards():
        torch.testing.assert_close(part.read(0, part.rows), bags[part.name].weight.detach(), rtol=1e-4, atol=1e-5)
        assert not torch.equal(bags[part.name].weight, before[part.name]), "rows that stand still show nothing"


def gradients_of_lookups(collection: Any, features: KeyedJaggedTensor) -> dict[str, Tensor]:
    """Of the squares of the pooled embeddings, [lookups, columns] by table."""
    names = {id(bag.weight): name for name, bag in collection.embedding_bags.items()}
    looked_up: dict[str, Tensor] = {}
    embedding = nn.functional.embedding

    def remember(ids: Tensor, weight: Tensor) -> Tensor:
        rows = looked_up[names[id(weight)]] = embedding(ids, weight)
        rows.retain_grad()
        return rows

    with mock.patch("torch.nn.functional.embedding", remember):
        (collection(features).values() ** 2).sum().backward()
    return {name: rows.grad for name, rows in looked_up.items() if rows.grad is not None}


@pytest.mark.parametrize("phase", ["plain", "search"])
def test_cached_rows_decay_and_clip_as_others_do(phase: str) -> None:
    formula = Formula(clip=LIMIT) if phase == "plain" else Formula(l2=0.5, clip=LIMIT)
    config = mpe.CacheConfig(bits=8, load_factor=1.0, stochastic_rounding=False)
    made = (
        shard(prepared(mpe.MPEEmbeddingBagCollection, phase), formula.fused()),
        shard(prepared(mpe.CachedEmbeddingBagCollection, phase, cache=config), formula.fused()),
    )
    pooled = []
    for model in made:
        mpe.reset_rows_(model, INITIALIZATION)
        for step in range(3):
            out = model.module["ebc"](batch(step, RUN)[0]).values()
            (out**2).sum().backward()
        pooled.append(out.detach())
    torch.testing.assert_close(*pooled, rtol=0, atol=0.02)  # rows are rounded to 8 bits once


@pytest.mark.parametrize(
    ("phase", "fused", "said"),
    [
        ("search", {"optimizer": SGD, "weight_decay": 0.1}, "exact_sgd has no weight decay, FBGEMM ignores"),
        ("plain", {"optimizer": ADAGRAD, "weight_decay": 0.1}, "exact_adagrad has no weight decay, FBGEMM ignores"),
        ("retrain", {"optimizer": ROWWISE, "weight_decay": 0.1}, "without a weight_decay_mode: give L2 or DECOUPLE"),
        ("plain", Formula(l2=0.1).fused(), "for pooled tables of one feature leaves weight_decay=0.1"),
        ("search", {"optimizer": ROWWISE, "weight_decay_mode": WeightDecayMode.COUNTER}, "COUNTER .* is not supported"),
    ],
)
def test_a_decay_that_would_be_left_out_is_refused(phase: str, fused: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"table t0: .*{said}"):
        shard(prepared(mpe.MPEEmbeddingBagCollection, phase), fused)


def test_a_cached_table_refuses_as_others_do() -> None:
    model = prepared(mpe.CachedEmbeddingBagCollection, "plain", cache=mpe.CacheConfig(bits=8, load_factor=0.5))
    with pytest.raises(ValueError, match=r"table t0: .* leaves weight_decay=0.1"):
        shard(model, Formula(l2=0.1).fused())
