"""Phases of sharded models, in one process."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import torchrec_mpe as mpe
from tests.distributed.equality import INITIALIZATION, TW, Case, local_batch, prepared_model, shard, tables, two_steps
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.modules.embedding_bag_collection import Phase
from torchrec_mpe.precision.from_frequencies import uniform_precision
from torchrec_mpe.precision.row_initialization import RowInitialization


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(torch.device("cpu")):
        yield
    assert not dist.is_initialized()


def adagrad(case: Case) -> DistributedModelParallel:
    """Sharded with row-wise Adagrad, whose state a reset has to clear, and trained for two steps."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology

    model = prepared_model(case)
    sharders = mpe.sharders({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1})
    constraints = {t.name: ParameterConstraints(sharding_types=[TW], compute_kernels=["fused"]) for t in tables(case)}
    planner = EmbeddingShardingPlanner(topology=Topology(world_size=1, compute_device="cpu"), constraints=constraints)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "mpe." in n or "linear." in n}


@pytest.mark.parametrize("phase", ["plain", "search", "retrain"])
def test_reset_clears_rows_and_fused_optimizer_and_nothing_else(phase: str) -> None:
    case = Case((TW,), phase=phase)
    model = adagrad(case)
    if phase == "plain":
        mpe.reset_rows_(model, INITIALIZATION)
    dense = [p for n, p in model.named_parameters() if "mpe." in n or "linear." in n]
    two_steps(model, case, 0, 1, dense)
    kept = learned(model)
    kernels = list(model.module.ebc.kernels())
    assert any(s.any() for k in kernels for states in k.emb_module.split_optimizer_states() for s in states)
    mpe.reset_rows_(model, INITIALIZATION if phase == "plain" else None)
    for table, row, column, values in model.module.ebc.local_shards():
        expected = INITIALIZATION.fill_(torch.empty_like(values), table, row, column)
        torch.testing.assert_close(values, expected, rtol=0, atol=0)
    assert not any(s.any() for k in kernels for states in k.emb_module.split_optimizer_states() for s in states)
    assert all(int(k.emb_module.iter_cpu) == 0 and int(k.emb_module.iter) == 0 for k in kernels)
    for name, value in learned(model).items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0)


def test_training_after_a_reset_is_training_from_the_start() -> None:
    case = Case((TW,), phase="retrain")
    first, second = adagrad(case), adagrad(case)
    features, _ = local_batch(7, case, 0, 1)
    for _ in range(3):
        second(features).sum().backward()
    mpe.reset_rows_(second)
    for model in (first, second):
        model.zero_grad()
        model(features).sum().backward()
    for (_, _, _, a), (_, _, _, b) in zip(
        first.module.ebc.local_shards(), second.module.ebc.local_shards(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_search_then_retrain_in_place() -> None:
    model = adagrad(Case((TW,)))
    plan = mpe.sample_precision(model)
    assert mpe.prepare_retrain_(model, plan) is model
    assert model.module.ebc.phase is Phase.RETRAIN
    names = dict(model.named_parameters())
    assert not any("gamma" in name for name in names)
    state = model.state_dict()
    assert "ebc.mpe.dim_8.alpha" in state and "ebc.embedding_bags.t0.weight" in state
    with pytest.raises(ValueError, match="not in the search phase"):
        mpe.bit_penalty(model)


def test_order_of_steps_is_told() -> None:
    plain = shard(prepared_model(Case((TW,), phase="plain")), Case((TW,), phase="plain"))
    with pytest.raises(ValueError, match=r"the model is sharded: prepare it for the search before"):
        mpe.prepare_search_(plain, {})
    with pytest.raises(ValueError, match="prepare the model before sharding it"):
        mpe.prepare_retrain_(plain, uniform_precision(tables(Case((TW,))), 4))
    searching = adagrad(Case((TW,)))
    with pytest.raises(KeyError, match="no bit-widths for table t1"):
        mpe.prepare_retrain_(searching, uniform_precision([t for t in tables(Case((TW,))) if t.name != "t1"], 4))
    assert any(isinstance(m, DistributedDataParallel) for m in searching.modules()), "it keeps its DDP"


def test_what_torchrec_computes_wrongly_is_refused() -> None:
    case = Case(("grid_shard",), mean=True)
    model = prepared_model(case)
    sharding = {t.name: type("Sharding", (), {"sharding_type": "grid_shard"})() for t in tables(case)}
    with pytest.raises(ValueError, match="table t0 has mean pooling, which TorchRec computes wrongly under grid"):
        ShardedMPEEmbeddingBagCollection(model.ebc, sharding, env=None)


def test_nothing_changes_if_one_collection_cannot_enter() -> None:
    first, second = prepared_model(Case((TW,), phase="plain")), prepared_model(Case((TW,), phase="plain"))
    for table in second.ebc.embedding_bag_configs():
        table.name = f"other_{table.name}"
    second.ebc = mpe.MPEEmbeddingBagCollection(second.ebc.embedding_bag_configs())
    model = nn.ModuleList([first, second])
    before = first.ebc.embedding_bags["t0"].weight.detach().clone()
    counts = {t.name: torch.ones(t.num_embeddings, dtype=torch.int64) for t in tables(Case((TW,)))}
    with pytest.raises(KeyError, match="other_t0"):
        mpe.prepare_search_(model, counts)
    assert first.ebc.phase is Phase.PLAIN and second.ebc.phase is Phase.PLAIN
    torch.testing.assert_close(first.ebc.embedding_bags["t0"].weight, before, rtol=0, atol=0)


def test_a_stock_collection_is_not_passed_over() -> None:
    """Forgetting torchrec_mpe.sharders() must not end in training that only looks like ours."""
    case = Case((TW,), phase="plain")
    stock = nn.Sequential(EmbeddingBagCollection(tables(case)))
    before = stock[0].embedding_bags["t0"].weight.detach().clone()
    with pytest.raises(ValueError, match=r"collection 0 is TorchRec's own EmbeddingBagCollection"):
        mpe.reset_rows_(stock, INITIALIZATION)
    torch.testing.assert_close(stock[0].embedding_bags["t0"].weight, before, rtol=0, atol=0)
    unsharded = DistributedModelParallel(prepared_model(Case((TW,))), device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"ebc unsharded: give torchrec_mpe.sharders\(\)"):
        mpe.prepare_retrain_(unsharded, uniform_precision(tables(case), 4))


def test_shapes_of_a_plan_are_checked_in_place_too() -> None:
    model = adagrad(Case((TW,)))
    narrow = [copy.copy(t) for t in tables(Case((TW,)))]
    for table in narrow:
        table.embedding_dim = 4
    with pytest.raises(ValueError, match="table t0 is 40 x 8, in the precision plan it is 40 x 4"):
        mpe.prepare_retrain_(model, uniform_precision(narrow, 4))
    assert model.module.ebc.phase is Phase.SEARCH


def test_a_state_of_other_counts_or_plan_is_refused() -> None:
    def search(seed: int) -> mpe.MPEEmbeddingBagCollection:
        g = torch.Generator().manual_seed(seed)
        counts = {t.name: torch.randint(0, 50, (t.num_embeddings,), generator=g) for t in tables(Case((TW,)))}
        model = mpe.MPEEmbeddingBagCollection(tables(Case((TW,))))
        mpe.prepare_search_(model, counts, mpe.SearchConfig(num_groups=4))
        return model

    search(0).load_state_dict(search(0).state_dict())
    with pytest.raises(RuntimeError, match=r"tables t0, t1 was prepared with other counts, groups or bit-widths"):
        search(0).load_state_dict(search(1).state_dict())
    retrain = [mpe.MPEEmbeddingBagCollection(tables(Case((TW,)))) for _ in range(2)]
    for model, bits in zip(retrain, (2, 3), strict=True):
        mpe.prepare_retrain_(model, uniform_precision(model, bits))
    with pytest.raises(RuntimeError, match="prepared with other counts"):
        retrain[0].load_state_dict(retrain[1].state_dict())
    assert not any("row_" in key for key in retrain[0].state_dict()), "a map of every row does not belong there"


def test_a_collection_under_two_names_is_replaced_under_both() -> None:
    model = nn.Module()
    model.x = model.y = EmbeddingBagCollection(tables(Case((TW,))))
    mpe.prepare_retrain_(model, uniform_precision(tables(Case((TW,))), 4))
    assert model.x is model.y and isinstance(model.x, mpe.MPEEmbeddingBagCollection)


def test_one_table_name_in_two_collections_is_refused() -> None:
    model = nn.ModuleList([EmbeddingBagCollection(tables(Case((TW,)))) for _ in range(2)])
    counts = {t.name: torch.ones(t.num_embeddings, dtype=torch.int64) for t in tables(Case((TW,)))}
    with pytest.raises(ValueError, match="two collections of the model have a table t0"):
        mpe.prepare_search_(model, counts)


def test_collections_of_different_settings_give_no_plan() -> None:
    parts = []
    for k, seed in enumerate((1, 2)):
        configs = [copy.copy(t) for t in tables(Case((TW,)))]
        for table in configs:
            table.name = f"{table.name}_{k}"
        part = mpe.MPEEmbeddingBagCollection(configs)
        counts = {t.name: torch.ones(t.num_embeddings, dtype=torch.int64) for t in configs}
        mpe.prepare_search_(part, counts, mpe.SearchConfig(initialization=RowInitialization(seed)))
        parts.append(part)
    with pytest.raises(ValueError, match="different SearchConfigs"):
        mpe.sample_precision(nn.ModuleList(parts))
