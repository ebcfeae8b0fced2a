"""A collection with feature processors around it, and other modules of TorchRec beside or around ours."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.feature_processor_ import PositionWeightedModule, PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.distributed.ranks import Ranks
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.precision.from_frequencies import uniform_precision

TABLES = [
    EmbeddingBagConfig(name="users", num_embeddings=40, embedding_dim=8, feature_names=["user"]),
    EmbeddingBagConfig(name="goods", num_embeddings=30, embedding_dim=8, feature_names=["good"]),
]
COUNTS = {table.name: torch.arange(table.num_embeddings, 0, -1) for table in TABLES}
LR = 0.5


@pytest.fixture
def group() -> Iterator[None]:
    with process_group(torch.device("cpu")):
        yield


class Model(nn.Module):
    def __init__(self, phase: str, together: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        ebc = EmbeddingBagCollection(TABLES, is_weighted=True, device=torch.device("cpu"))
        processors: Any = {feature: PositionWeightedModule(4) for feature in ("user", "good")}
        if together:
            processors = PositionWeightedModuleCollection({"user": 4, "good": 4})
        with torch.no_grad():
            for parameter in nn.ModuleList([processors] if together else list(processors.values())).parameters():
                parameter.copy_(torch.rand(4) + 0.5)
        self.fp = FeatureProcessedEmbeddingBagCollection(ebc, processors)
        self.top = nn.Linear(16, 1)
        if phase == "search":
            mpe.prepare_search_(self, COUNTS)
        elif phase == "retrain":
            mpe.prepare_retrain_(self, uniform_precision(TABLES, 6))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        pooled = self.fp(features)
        logits: Tensor = self.top(torch.cat([pooled["user"], pooled["good"]], 1)).squeeze(1)
        return logits


def batch(step: int, rank: int = 0) -> KeyedJaggedTensor:
    g = torch.Generator().manual_seed(10 * step + rank)
    lengths = torch.randint(0, 5, (2, 6), generator=g)
    ids = [
        torch.randint(0, t.num_embeddings, (int(n.sum()),), generator=g) for t, n in zip(TABLES, lengths, strict=True)
    ]
    return KeyedJaggedTensor(["user", "good"], torch.cat(ids), lengths=lengths.flatten())


def sharded(model: nn.Module, kind: str) -> DistributedModelParallel:
    sharders = mpe.sharders({"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": LR})
    constraints = {t.name: ParameterConstraints(sharding_types=[kind]) for t in TABLES}
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = mpe.MPEShardingPlanner(topology=topology, batch_size=6, constraints=constraints)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def train(model: nn.Module, parameters: list[nn.Parameter], rank: int = 0) -> list[float]:
    optimizer = torch.optim.SGD(parameters, lr=LR)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = (model(batch(step, rank)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def dense(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in in_backward_optimizer_filter(model.named_parameters())]


@pytest.mark.supports("feature processors", "CPU")
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", ["table_wise", "row_wise"])
@pytest.mark.parametrize("phase", ["plain", "search", "retrain"])
def test_sharded_equals_unsharded(phase: str, kind: str, together: bool, tmp_path: Path, group: None) -> None:
    alone, model = Model(phase, together), sharded(Model(phase, together), kind)
    if phase == "plain":
        own = alone.state_dict()
        model.load_state_dict({f"{k}": v for k, v in own.items()}, strict=False)
        rows = {t.name: alone.fp._embedding_bag_collection.embedding_bags[t.name].weight for t in TABLES}
        with torch.no_grad():
            for module in model.modules():
                if hasattr(module, "local_shards"):
                    for table, _, _, values in module.local_shards():
                        values.copy_(rows[table])
    expected = train(alone, list(alone.parameters()))
    assert train(model, dense(model)) == pytest.approx(expected, rel=1e-5)
    for (name, one), (_, other) in zip(
        alone.fp._feature_processors.named_parameters(),
        model.module.fp._feature_processors.named_parameters(),
        strict=True,
    ):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6, msg=name)
    if phase == "retrain":
        emitted = mpe.emit_inference_model(model)
        with torch.no_grad():
            torch.testing.assert_close(emitted(batch(9)), alone.eval()(batch(9)), rtol=1e-4, atol=1e-5)
        mpe.save(emitted, tmp_path / "artifact")
        loaded = mpe.load(tmp_path / "artifact", Model("plain", together))
        torch.testing.assert_close(loaded(batch(9)), emitted(batch(9)), rtol=0, atol=0)


def trained_over_ranks(phase: str) -> list[list[float]]:
    model = sharded(Model(phase), "row_wise")
    train(model, dense(model), dist.get_rank())
    return [p.detach().flatten().tolist() for p in dense(model)]


@pytest.mark.supports("feature processors", "several ranks, gloo")
@pytest.mark.parametrize("phase", ["search", "retrain"])
def test_ranks_keep_quantizers_and_processors_alike(phase: str, two_ranks: Ranks) -> None:
    one, other = two_ranks.run(trained_over_ranks, phase)
    assert one == other and any(values != [1.0] * len(values) for values in one)


@pytest.mark.supports("compress a model with feature processors", "CPU")
def test_compress(group: None) -> None:
    alone = Model("")
    model = sharded(Model(""), "table_wise")
    counter = mpe.FrequencyCounter(TABLES)
    for step in range(20):
        features = batch(step)
        counter.update(
            KeyedJaggedTensor(
                features.keys(), features.values(), torch.ones(len(features.values())), lengths=features.lengths()
            )
        )
    batches = [batch(step) for step in range(4)]
    curvature = [mpe.measure_curvature(m, batches, forward=lambda m, b: m(b)) for m in (alone, model)]
    for table in TABLES:
        assert float(curvature[1][table.name].abs().max()) > 0
    coded = mpe.compress(model, counter, curvature[1], bytes=1000)
    coded(batch(3))
    assert type(coded.fp) is FeatureProcessedEmbeddingBagCollection  # type: ignore[union-attr]


def test_cached_tables_with_feature_processors_are_refused_by_the_planner() -> None:
    model = Model("")
    cached = mpe.CachedEmbeddingBagCollection(TABLES, is_weighted=True, device=torch.device("meta"))
    model.fp = FeatureProcessedEmbeddingBagCollection(cached, model.fp._feature_processors)  # type: ignore[arg-type]
    planner = mpe.MPEShardingPlanner(topology=Topology(world_size=1, compute_device="cpu"), stats=[], debug=False)
    with pytest.raises(ValueError, match=r"^tables users, goods have a cache and are in fp, a FeatureProcessed"):
        planner.plan(model, mpe.sharders())


def test_tracked_counts_weigh_bags_as_their_processors_do(group: None) -> None:
    """compress asks for the squares of weights, which no batch has before its features are processed."""
    unsharded = Model("")
    plain = unsharded.fp._embedding_bag_collection
    unsharded.fp._embedding_bag_collection = mpe.MPEEmbeddingBagCollection.from_plain(plain)
    model = sharded(unsharded, "table_wise")
    frequencies = mpe.track_frequencies_(model)
    expected = mpe.FrequencyCounter(TABLES)
    for step in range(3):
        model(batch(step))
        expected.update(model.module.fp._feature_processors(batch(step)))
    counts = frequencies.merged()
    for table in TABLES:
        assert counts[table.name].equal(expected[table.name])
        torch.testing.assert_close(counts.squared_weights[table.name], expected.squared_weights[table.name])
    mpe.compress(model, counts, bytes=1000)(batch(3))


def test_a_sharded_module_of_another_kind_comes_along(tmp_path: Path, group: None) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ebc = EmbeddingBagCollection(TABLES, device=torch.device("cpu"))
            self.ec = EmbeddingCollection(
                [EmbeddingConfig(name="s", num_embeddings=30, embedding_dim=8, feature_names=["good"])],
                device=torch.device("cpu"),
            )

        def forward(self, features: KeyedJaggedTensor) -> Tensor:
            total: Tensor = self.ebc(features).values().sum() + self.ec(features)["good"].values().sum()
            return total

    model = Two()
    mpe.prepare_retrain_(model, uniform_precision(TABLES, 4))
    dmp = sharded(model, "table_wise")
    dmp(batch(0)).backward()
    emitted = mpe.emit_inference_model(dmp)
    assert emitted.ec is dmp.module.ec
    assert dmp.module.ec.training and not emitted.training, "training goes on"
    with torch.no_grad():
        torch.testing.assert_close(emitted(batch(1)), dmp.eval()(batch(1)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"tensor ec\.embeddings\.s\.weight is sharded: an artifact holds whole"):
        mpe.save(emitted, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_a_module_that_shards_the_collection_in_it_is_refused() -> None:
    ebc = EmbeddingBagCollection(TABLES, device=torch.device("cpu"))
    zch = {
        t.name: MCHManagedCollisionModule(t.num_embeddings, torch.device("cpu"), DistanceLFU_EvictionPolicy(), 1)
        for t in TABLES
    }
    model = nn.Sequential(ManagedCollisionEmbeddingBagCollection(ebc, ManagedCollisionCollection(zch, TABLES)))
    said = r"^tables users, goods are in 0, a ManagedCollisionEmbeddingBagCollection, which TorchRec shards as a whole"
    with pytest.raises(ValueError, match=said):
        mpe.prepare_search_(model, COUNTS)
    with pytest.raises(ValueError, match=said):
        mpe.prepare_retrain_(model, uniform_precision(TABLES, 4))


def test_a_search_without_our_sharders_is_refused_at_its_first_step(group: None) -> None:
    ebc = EmbeddingBagCollection(TABLES, device=torch.device("cpu"))
    prepared = mpe.prepare_search_(nn.Sequential(ebc), COUNTS)
    model = DistributedModelParallel(prepared, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^collection \S+ is not sharded: give torchrec_mpe.sharders\(\)"):
        mpe.bit_penalty(model)
    with pytest.raises(ValueError, match=r"^collection \S+ is not sharded: give torchrec_mpe.sharders\(\)"):
        mpe.sample_precision(model)
    model = DistributedModelParallel(Model("search"), device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^collection \S+ is not sharded: give torchrec_mpe.sharders\(\)"):
        mpe.bit_penalty(model)


def test_torchrec_s_own_sharders_leave_a_prepared_collection_quantized(group: None) -> None:
    """They know no quantizers: rows that they shard would be trained as fp32 without a word."""
    alone, model = Model("retrain"), DistributedModelParallel(Model("retrain"), device=torch.device("cpu"))
    torch.testing.assert_close(model(batch(1)), alone(batch(1)), rtol=0, atol=0)
    planner = mpe.MPEShardingPlanner(topology=Topology(world_size=1, compute_device="cpu"), stats=[], debug=False)
    with pytest.raises(ValueError, match=r"^collection fp\S* is a MPEEmbeddingBagCollection, for which .* no sharder"):
        planner.collective_plan(alone, get_default_sharders(), dist.GroupMember.WORLD)
    assert planner.collective_plan(alone, None, dist.GroupMember.WORLD).plan
