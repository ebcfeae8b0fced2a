"""Ids that are no rows: one policy for every phase, sharded or not."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.modules.check_ids import FeatureRows, check_ids, rows_of_features
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection
from torchrec_mpe.precision.from_frequencies import uniform_precision

TABLES = [
    EmbeddingBagConfig(name="users", num_embeddings=40, embedding_dim=8, feature_names=["user"]),
    EmbeddingBagConfig(name="goods", num_embeddings=30, embedding_dim=8, feature_names=["good", "bought"]),
]
COUNTS = {table.name: torch.arange(table.num_embeddings, 0, -1) for table in TABLES}
PHASES = ("plain", "search", "retrain", "cached")
WRONG = (-1, 30, -(2**40), 2**40)


@pytest.fixture
def group() -> Iterator[None]:
    with process_group(torch.device("cpu")):
        yield


class Model(nn.Module):
    def __init__(self, phase: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.ebc: Any = EmbeddingBagCollection(TABLES, device=torch.device("cpu"))
        if phase == "cached":
            self.ebc = mpe.CachedEmbeddingBagCollection(TABLES, cache=mpe.CacheConfig(bits=8, load_factor=0.5))
        elif phase == "plain":
            self.ebc = MPEEmbeddingBagCollection.from_plain(self.ebc)
        elif phase == "search":
            mpe.prepare_search_(self, COUNTS)
        else:
            mpe.prepare_retrain_(self, uniform_precision(TABLES, 6))
        self.top = nn.Linear(24, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        logits: torch.Tensor = self.top(self.ebc(features).values())
        return logits


def sharded(model: nn.Module, kind: str, fused: dict[str, Any] | None = None) -> DistributedModelParallel:
    sharders = mpe.sharders({"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.5} | (fused or {}))
    constraints = {table.name: ParameterConstraints(sharding_types=[kind]) for table in TABLES}
    topology = Topology(world_size=1, compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    if any(isinstance(module, mpe.CachedEmbeddingBagCollection) for module in model.modules()):
        planner = mpe.MPEShardingPlanner(topology=topology, batch_size=4, constraints=constraints)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def batch(good: int, dtype: torch.dtype = torch.int64) -> KeyedJaggedTensor:
    keys = ["user", "good", "bought"]
    return KeyedJaggedTensor.from_lengths_sync(keys, torch.tensor([5, good, 7]).to(dtype), torch.tensor([1, 1, 1]))


def rows_of(model: DistributedModelParallel) -> dict[str, torch.Tensor]:
    """What is looked up, row by row: also of cached tables, which no shard shows."""
    features = [table.feature_names[0] for table in TABLES]
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for number, table in enumerate(TABLES):
            ids = torch.arange(table.num_embeddings)
            lengths = torch.zeros(3, len(ids), dtype=torch.int64)
            lengths[number] = 1
            kjt = KeyedJaggedTensor.from_lengths_sync(["user", "good", "bought"], ids, lengths.flatten())
            found[table.name] = model.module.ebc(kjt)[features[number]].clone()
    return found


@pytest.mark.parametrize("kind", ["table_wise", "row_wise"])
@pytest.mark.parametrize("phase", PHASES)
def test_sharded_phases_raise_before_a_row_changes(phase: str, kind: str, group: None) -> None:
    model = sharded(Model(phase), kind)
    before = rows_of(model)
    for wrong in WRONG:
        with pytest.raises(IndexError, match=rf"^table goods, feature good: id {wrong} is not in \[0, 30\)$"):
            model(batch(wrong)).sum().backward()
    for table, rows in rows_of(model).items():
        torch.testing.assert_close(rows, before[table], rtol=0, atol=0)
    model(batch(29, torch.int32)).sum().backward()
    assert not torch.equal(rows_of(model)["goods"][29], before["goods"][29])


@pytest.mark.parametrize("phase", PHASES)
def test_fbgemm_s_other_modes(phase: str, group: None) -> None:
    for mode in (BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE):
        model = sharded(Model(phase), "row_wise", {"bounds_check_mode": mode})
        first = model(batch(0)).detach()
        torch.testing.assert_close(model(batch(0, torch.int32)).detach(), first, rtol=0, atol=0)
        for wrong in WRONG:
            if mode == BoundsCheckMode.WARNING:
                said = rf"table goods, feature good: 1 ids of a batch, the first {wrong}, are not in \[0, 30\) and are"
                with pytest.warns(UserWarning, match=said):
                    read = model(batch(wrong))
            else:
                read = model(batch(wrong))
            torch.testing.assert_close(read.detach(), first, rtol=0, atol=0)


@pytest.mark.parametrize("phase", ["search", "retrain"])
def test_unsharded_phases(phase: str) -> None:
    model = Model(phase)
    for wrong in WRONG:
        with pytest.raises(IndexError, match=rf"^table goods, feature good: id {wrong} is not in \[0, 30\)$"):
            model(batch(wrong))


def test_what_is_kept_of_a_batch() -> None:
    """Weights, variable batches and inverse indices; the batch itself stays as it is."""
    rows = {"a": FeatureRows("t", 3, BoundsCheckMode.IGNORE)}
    values = torch.tensor([0, 9, 2, 9])
    kjt = KeyedJaggedTensor(
        ["a", "b"],
        values,
        torch.arange(4.0),
        lengths=torch.tensor([2, 1, 1]),
        stride_per_key_per_rank=[[2], [1]],
        inverse_indices=(["a", "b"], torch.tensor([[0, 1], [0, 0]])),
    )
    kept = check_ids(kjt, rows)
    assert kept.values().tolist() == [0, 0, 2, 9] and values.tolist() == [0, 9, 2, 9]
    assert kept.weights().tolist() == [0, 1, 2, 3] and kept.lengths().tolist() == [2, 1, 1]
    assert kept.stride_per_key_per_rank() == [[2], [1]] and kept.inverse_indices()[1].tolist() == [[0, 1], [0, 0]]
    assert check_ids(kjt, {"a": FeatureRows("t", 10), "b": FeatureRows("t", 10)}) is kjt
    assert check_ids(kjt, {"a": FeatureRows("t", 3, BoundsCheckMode.NONE)}) is kjt
    small = EmbeddingBagConfig(name="small", num_embeddings=4, embedding_dim=8, feature_names=["bought"])
    assert rows_of_features([*TABLES, small])["bought"] == FeatureRows("small", 4)


@pytest.mark.parametrize("phase", ["plain", "search", "retrain"])
def test_no_buffer_comes_into_being_in_forward(phase: str) -> None:
    model = Model(phase)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    names = [name for name, _ in model.named_buffers()]
    model(batch(3))
    assert [name for name, _ in model.named_buffers()] == names
    average.update_parameters(model)
    torch.testing.assert_close(average(batch(3)), model(batch(3)))
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(batch(3)), model(batch(3)), rtol=0, atol=0)


def test_row_maps_follow_the_phase() -> None:
    model = Model("search")
    model(batch(3))
    mpe.prepare_retrain_(model, uniform_precision(TABLES, 2))
    model.ebc.embedding_bags["goods"].weight.data.copy_(torch.randn(30, 8))
    coarse = model(batch(3))
    mpe.prepare_retrain_(model, uniform_precision(TABLES, 6))
    assert not torch.equal(model(batch(3)), coarse)


@pytest.mark.filterwarnings("ignore:This API is deprecated:DeprecationWarning")
@pytest.mark.parametrize("phase", ["search", "retrain"])
def test_an_optimizer_in_backward_before_or_after_preparation(phase: str, group: None) -> None:
    """The collection's rows are given one, in the order of TorchRec's golden example or the other."""

    def trained(first: str) -> list[torch.Tensor]:
        model = Model("plain")
        model.ebc = EmbeddingBagCollection(TABLES, device=torch.device("meta"))
        for action in (first, "prepare" if first == "apply" else "apply"):
            if action == "apply":
                apply_optimizer_in_backward(torch.optim.Adagrad, model.ebc.parameters(), {"lr": 0.02})
            elif phase == "search":
                mpe.prepare_search_(model, COUNTS)
            else:
                mpe.prepare_retrain_(model, uniform_precision(TABLES, 6))
        model = sharded(model, "table_wise")  # type: ignore[assignment]
        ebc: Any = model.module.ebc  # type: ignore[union-attr]
        assert isinstance(ebc, ShardedMPEEmbeddingBagCollection)
        dense = [p for _, p in mpe_optimized(model)]
        assert {id(p) for p in ebc.mpe.parameters()} <= {id(p) for p in dense}
        optimizer = torch.optim.Adam(dense, lr=0.01)
        for good in (3, 4, 3):
            optimizer.zero_grad()
            (model(batch(good)).sum() ** 2).backward()
            optimizer.step()
        return [*(p.detach().clone() for p in dense), *rows_of(model).values()]  # type: ignore[arg-type]

    for one, other in zip(trained("apply"), trained("prepare"), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def mpe_optimized(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    from torchrec.optim.optimizers import in_backward_optimizer_filter

    yield from in_backward_optimizer_filter(model.named_parameters())


@pytest.mark.filterwarnings("ignore:This API is deprecated:DeprecationWarning")
def test_quantizers_with_an_optimizer_in_backward_are_refused_unsharded() -> None:
    model = Model("search")
    apply_optimizer_in_backward(torch.optim.SGD, model.ebc.embedding_bags.parameters(), {"lr": 0.02})
    model(batch(3)).sum().backward()
    apply_optimizer_in_backward(torch.optim.SGD, model.ebc.parameters(), {"lr": 0.02})
    with pytest.raises(ValueError, match=r"was given the quantizers of dimension 8 \(mpe.dim_8\) with the rows: give"):
        model(batch(3))
