"""Checkpoints of cached tables: training goes on bit for bit, and tables move to another sharding."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.optimizers import in_backward_optimizer_filter

import torchrec_mpe as mpe
from tests.distributed import cached_cases
from tests.distributed.cached_cases import (
    ADAGRAD,
    INITIALIZATION,
    LFU,
    ROWWISE,
    SGD,
    SMALL,
    WHOLE,
    Case,
    Model,
    counts,
    local_batch,
    shard,
    sharded,
    shards,
    tables,
    train,
    whole,
)
from tests.distributed.equality import CW, RW, TW, TWCW
from tests.distributed.ranks import Ranks

SAVED, LAST = 4, 8


def state(model: Any) -> dict[str, Any]:
    ebc = model.module.ebc
    return {
        "rows": list(shards(model)),
        "statistics": ebc.cache_statistics(),
        "steps": [int(part.emb_module.iter) for part in ebc.cached_shards()],
        "stored": {
            f"{part.name} {part.first_row} {part.first_column} {kind}": tensor.numpy().copy()
            for part in ebc.cached_shards()
            for kind, tensor in part.stored().items()
        },
    }


def train_and_save(case: Case, folder: str) -> dict[str, Any]:
    """State at the save, what training gives after it, and again after going back to it."""
    model = sharded(case)
    train(model, case, 0, SAVED)
    checkpoints = mpe.Checkpoints(folder)
    checkpoints.save(model, step=SAVED)
    out = {"saved": state(model), "pooled": train(model, case, SAVED, LAST), "end": state(model)}
    # As a process does that is killed after rows have left the cache, but in the same memory.
    found = checkpoints.newest()
    assert found is not None
    checkpoints.load(model, None, found)
    return {**out, "pooled again": train(model, case, SAVED, LAST), "end again": state(model)}


def load_and_train(case: Case, folder: str) -> dict[str, Any]:
    model = shard(Model(case), case)
    train(model, case, 50, 52)
    checkpoints = mpe.Checkpoints(folder)
    found = checkpoints.newest()
    assert found is not None and found.step == SAVED
    checkpoints.load(model, None, found)
    return {"saved": state(model), "pooled": train(model, case, SAVED, LAST), "end": state(model)}


def assert_same(found: dict[str, Any], want: dict[str, Any], what: str) -> None:
    for (*a, values), (*b, expected) in zip(found["rows"], want["rows"], strict=True):
        assert a == b
        np.testing.assert_array_equal(values, expected, err_msg=f"{what}: {a}")
    assert found["stored"].keys() == want["stored"].keys()
    for key, values in want["stored"].items():
        np.testing.assert_array_equal(found["stored"][key], values, err_msg=f"{what}: {key}")
    assert found["statistics"] == want["statistics"] and found["steps"] == want["steps"], what


LFU_OFTEN_HALVED = mpe.CacheConfig(bits=4, load_factor=0.2, algorithm=LFU, half_life=0.25)
SAME_SHARDING = [
    Case((TW,)),
    Case((RW, CW, TW, RW), optimizer=ADAGRAD, uncached=("t2",)),
    Case((CW, RW, RW, TW), cache=LFU_OFTEN_HALVED),
    Case((RW,), optimizer=SGD, mixed=True),
]


@pytest.mark.supports("checkpoints: cached tables, resumed bit for bit", "several ranks, gloo")
@pytest.mark.parametrize("case", SAME_SHARDING, ids=str)
def test_resumes_bit_for_bit(case: Case, two_ranks: Ranks, two_other_ranks: Ranks, tmp_path: Path) -> None:
    saved = two_ranks.run(train_and_save, case, str(tmp_path))
    fresh = two_other_ranks.run(load_and_train, case, str(tmp_path))
    assert sum(s.num_evictions for rank in saved for s in rank["end"]["statistics"].values()) > 100
    for rank, (want, found) in enumerate(zip(saved, fresh, strict=True)):
        assert_same(found["saved"], want["saved"], f"rank {rank}, after loading")
        assert_same(found["end"], want["end"], f"rank {rank}, after going on")
        assert_same(want["end again"], want["end"], f"rank {rank}, after going back")
        for step in range(LAST - SAVED):
            for pooled in (found["pooled"], want["pooled again"]):
                np.testing.assert_array_equal(pooled[step], want["pooled"][step], err_msg=f"rank {rank}, step {step}")
        saved_and_end = zip(want["saved"]["rows"], want["end"]["rows"], strict=True)
        assert any(not np.array_equal(a, b) for (*_, a), (*_, b) in saved_and_end)


def reshard(ways: list[tuple[Case, Case, str]]) -> list[dict[str, Any]]:
    return [load_and_train(there, folder) for _, there, folder in ways]


def save_all(ways: list[tuple[Case, Case, str]]) -> list[dict[str, Any]]:
    return [train_and_save(case, folder) for case, _, folder in ways]


MIXED = Case((TW,), cache=WHOLE, mixed=True)
COUNTED = Case((RW,), cache=mpe.CacheConfig(load_factor=1.0, algorithm=LFU), optimizer=ADAGRAD)
RESHARDINGS = [
    (Case((TW,), cache=WHOLE), Case((RW,), cache=WHOLE)),
    (Case((RW,), cache=WHOLE, optimizer=ADAGRAD), Case((TW,), cache=WHOLE, optimizer=ADAGRAD)),
    (MIXED, replace(MIXED, sharding=(RW,))),
    (replace(MIXED, sharding=(RW,)), MIXED),
    (COUNTED, replace(COUNTED, sharding=(TW,))),
    (Case((CW,), cache=WHOLE), Case((TWCW,), cache=WHOLE)),
]


def test_moves_between_shardings_and_numbers_of_ranks(
    two_ranks: Ranks, two_other_ranks: Ranks, lone_rank: Ranks, four_ranks: Ranks, tmp_path: Path
) -> None:
    """With caches as large as the tables nothing is rounded after loading, so that training is the same everywhere."""
    ways = [(here, there, str(tmp_path / str(k))) for k, (here, there) in enumerate(RESHARDINGS)]
    saved = two_ranks.run(save_all, ways)
    for ranks in (lone_rank, two_other_ranks, four_ranks):
        loaded = ranks.run(reshard, ways)
        for k, (here, there, _) in enumerate(ways):
            before, found = (whole([rank[k]["saved"]["rows"] for rank in by_rank], here) for by_rank in (saved, loaded))
            end, reached = (whole([rank[k]["end"]["rows"] for rank in by_rank], here) for by_rank in (saved, loaded))
            what = f"{here} to {there} on {len(loaded)}"
            for name, rows in before.items():
                np.testing.assert_array_equal(found[name], rows, err_msg=f"{what}: {name}")
                # Optimizer state moved with the rows, or they would not go the same way.
                np.testing.assert_allclose(reached[name], end[name], rtol=0, atol=2e-5, err_msg=f"{what}: {name}")
                assert len(rows) < 9 or np.abs(end[name] - rows).max() > 1e-2
            if len(here.sharding) == 1 and here.cache.algorithm == LFU:
                stored = [rank[k]["saved"]["stored"] for rank in saved], [rank[k]["saved"]["stored"] for rank in loaded]
                counted = [
                    np.concatenate([s[key] for s in by for key in s if "t0" in key and "counts" in key])
                    for by in stored
                ]
                np.testing.assert_array_equal(*counted)


def what_is_said(case: Case, folder: str, **settings: Any) -> str:
    model = sharded(case)
    checkpoints = mpe.Checkpoints(folder)
    found = checkpoints.newest()
    assert found is not None
    before = state(model)
    try:
        checkpoints.load(model, None, found, **settings)
    except ValueError as error:
        assert_same(state(model), before, "after a refusal")
        return str(error)
    return ""


def save(case: Case, folder: str) -> None:
    model = sharded(case)
    train(model, case, 0, 2)
    mpe.Checkpoints(folder).save(model, step=2)


REFUSED = [
    (Case((CW,)), Case((TW,)), "t0.weight is cached in column shards [16] here and [8, 8] when saved"),
    (Case((TW,)), Case((CW,)), "t0.weight is cached in column shards [8, 8] here and [16] when saved"),
    (Case((TW,)), Case((TW,), uncached=("t1",)), "t1.weight is not cached here and was when saved"),
    (Case((TW,), uncached=("t1",)), Case((TW,)), "t1.weight is cached here and was not when saved"),
    (
        Case((TW,)),
        Case((TW,), optimizer=ADAGRAD),
        "t0.weight is cached, and its stored rows hold their optimizer state, 32 bytes a row here "
        "(exact_adagrad with 16 of bf16) and 1 when saved (exact_row_wise_adagrad with 1 of ue6m2)",
    ),
    (
        Case((CW,)),
        Case((CW,), cache=replace(SMALL, optimizer_state_dtype="bf16")),
        "t0.weight is cached, and its stored rows hold their optimizer state, 4 bytes a row here",
    ),
]


@pytest.mark.parametrize(
    ("saved", "loaded", "message"), REFUSED, ids=lambda value: "" if isinstance(value, Case) else value
)
def test_refusals(saved: Case, loaded: Case, message: str, two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(save, saved, str(tmp_path))
    for said in two_ranks.run(what_is_said, loaded, str(tmp_path)):
        assert message in said


def said_of(case: Case, folder: str, choice: Any) -> str:
    return what_is_said(case, folder, optimizer_state=choice)


def test_state_of_another_size_is_refused_in_any_case(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(save, Case((TW,)), str(tmp_path))
    for choice in (False, "where possible"):
        for said in two_ranks.run(said_of, Case((TW,), optimizer=SGD), str(tmp_path), choice):
            assert "0 bytes a row here (exact_sgd with no state) and 1 when saved" in said
            assert "cannot be loaded, with any optimizer_state" in said


def narrow_tables(case: Case) -> list[EmbeddingBagConfig]:
    """Tables of 4 columns: an fp32 state a row takes as many bytes as a 1-byte state an element."""
    return [replace(table, embedding_dim=4) for table in tables(case)]


def narrow(function: Any, *arguments: Any) -> Any:
    with (
        mock.patch.object(cached_cases, "tables", narrow_tables),
        mock.patch.dict(cached_cases.KEYS, dict.fromkeys(cached_cases.KEYS, 4)),
    ):
        return function(*arguments)


def states_are_empty(case: Case, folder: str) -> bool:
    model = sharded(case)
    checkpoints = mpe.Checkpoints(folder)
    found = checkpoints.newest()
    assert found is not None
    checkpoints.load(model, None, found, optimizer_state="where possible")
    stored = [t for part in model.module.ebc.cached_shards() for t in part.stored().values()]
    assert any(t[:, :-4].any() for t in stored)
    return not any(t[:, -4:].any() for t in stored)


def test_state_of_another_optimizer_is_not_taken_for_its_own(two_ranks: Ranks, tmp_path: Path) -> None:
    here, there = (
        Case((TW,), optimizer=optimizer, cache=replace(SMALL, optimizer_state_dtype=dtype))
        for optimizer, dtype in ((ROWWISE, "fp32"), (ADAGRAD, "ue6m2"))
    )
    two_ranks.run(narrow, save, here, str(tmp_path))
    for said in two_ranks.run(narrow, said_of, there, str(tmp_path), True):
        for reason in ("t0.weight: ", "exact_row_wise_adagrad with 1 of fp32", "exact_adagrad with 4 of ue6m2"):
            assert reason in said
    assert all(two_ranks.run(narrow, states_are_empty, there, str(tmp_path)))


def turned_counts(case: Case) -> dict[str, Tensor]:
    return {table: of_rows.flip(0) for table, of_rows in counts(case).items()}


def said_under_another_plan(case: Case, folder: str) -> str:
    """Of a plan with as many wide rows, but others."""
    with mock.patch.object(cached_cases, "counts", turned_counts):
        return what_is_said(case, folder)


def test_another_precision_plan_is_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(save, MIXED, str(tmp_path))
    for said in two_ranks.run(said_under_another_plan, replace(MIXED, sharding=(RW,)), str(tmp_path)):
        assert "t0.weight stores other rows in 8 bits here than when saved: give" in said and "precision plan" in said


def load_with_a_loss_alive(case: Case, folder: str) -> None:
    """Asserts on the ranks: nothing is loaded before the loss of a step that is given up is dropped."""
    model = sharded(case)
    train(model, case, 0, 2)
    checkpoints = mpe.Checkpoints(folder)
    checkpoints.save(model, step=2)
    saved = state(model)
    train(model, case, 2, 5)
    pooled = model(local_batch(5, case)[0])
    model.state_dict()  # rounds the rows
    before = state(model)
    found = checkpoints.newest()
    assert found is not None
    with pytest.raises(RuntimeError, match=r"tables .*t[0-3].* have a forward that waits .* drop .* `del loss`"):
        checkpoints.load(model, None, found)
    for (*_, values), (*_, expected) in zip(state(model)["rows"], before["rows"], strict=True):
        np.testing.assert_allclose(values, expected, rtol=0, atol=0.01)
    del pooled
    checkpoints.load(model, None, found)
    assert_same(state(model), saved, "after loading")


def test_nothing_is_loaded_while_a_batch_is_in_flight(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(load_with_a_loss_alive, Case((TW,)), str(tmp_path))


def without_optimizer_state(case: Case, folder: str) -> list[bool]:
    model = sharded(case)
    checkpoints = mpe.Checkpoints(folder)
    found = checkpoints.newest()
    assert found is not None
    checkpoints.load(model, None, found, optimizer_state=False)
    fresh = [part.emb_module.iter.item() == 0 for part in model.module.ebc.cached_shards()]
    # Row-wise Adagrad's state is the last byte of a row.
    return [*fresh, *(not t[:, -1].any() for p in model.module.ebc.cached_shards() for t in p.stored().values())]


def test_optimizer_state_may_be_left_out(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(save, Case((RW,)), str(tmp_path))
    for empty in two_ranks.run(without_optimizer_state, Case((TW,)), str(tmp_path)):
        assert empty and all(empty)


def searching(case: Case, found: Any = None) -> Any:
    model = Model(case)
    if found is None:
        mpe.prepare_search_(model, counts(case), mpe.SearchConfig(num_groups=4, initialization=INITIALIZATION))
    else:
        found.prepare_(model)
    return shard(model, case)


def search_steps(model: Any, optimizer: torch.optim.Optimizer, case: Case, first: int, last: int) -> list[Any]:
    pooled = []
    for step in range(first, last):
        features, targets = local_batch(step, case)
        out = model(features)
        optimizer.zero_grad()
        (((out - targets) ** 2).sum(1).mean() + mpe.bit_penalty(model)).backward()
        optimizer.step()
        pooled.append(out.detach().numpy())
    return pooled


def search_and_resume(case: Case, folder: str) -> None:
    """Asserts on the ranks: a search on cached tables goes on bit for bit in a model that was prepared anew."""
    model = searching(case)
    optimizer = torch.optim.Adam([p for _, p in in_backward_optimizer_filter(model.named_parameters())], lr=0.01)
    search_steps(model, optimizer, case, 0, 3)
    checkpoints = mpe.Checkpoints(folder)
    checkpoints.save(model, optimizer, step=3, counts=counts(case))
    want = search_steps(model, optimizer, case, 3, 6)
    found = checkpoints.newest()
    assert found is not None
    fresh = searching(case, found)
    other = torch.optim.Adam([p for _, p in in_backward_optimizer_filter(fresh.named_parameters())], lr=0.01)
    checkpoints.load(fresh, other, found)
    for a, b in zip(search_steps(fresh, other, case, 3, 6), want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert_same(state(fresh), state(model), "after going on")


def test_a_search_resumes_bit_for_bit(two_ranks: Ranks, tmp_path: Path) -> None:
    cache = mpe.CacheConfig(bits=8, load_factor=0.1)
    two_ranks.run(search_and_resume, Case((RW, CW, TW, TW), cache=cache), str(tmp_path))


def test_an_unsharded_model_cannot_load_stores(two_ranks: Ranks, tmp_path: Path) -> None:
    case = Case((TW,))
    two_ranks.run(save, case, str(tmp_path))
    checkpoints = mpe.Checkpoints(str(tmp_path))
    found = checkpoints.newest()
    assert found is not None
    model = mpe.CachedEmbeddingBagCollection(tables(case))
    with pytest.raises(ValueError, match=r"t0.weight was cached when saved: load it into .* that is sharded"):
        checkpoints.load(model, None, found, optimizer_state=False)
