"""State dicts of cached tables: what is not loaded stays, and a table is loaded as a whole or not at all."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.distributed import cached_cases
from tests.distributed.cached_cases import LFU, SMALL, Case, counts, local_batch, sharded, shards, train
from tests.distributed.equality import CW, RW, TW
from tests.distributed.ranks import Ranks
from torchrec_mpe.distributed.cached_state import wide_rows_digest

CASE = Case((RW, TW, CW, TW))
STEP = 0.01  # more than a step of the INT8 grid
Rows = dict[tuple[str, int, int], np.ndarray[Any, Any]]


def rows(model: nn.Module) -> Rows:
    return {(table, row, column): values for table, row, column, values in shards(model)}  # type: ignore[arg-type]


def trained(case: Case = CASE) -> tuple[Any, Rows]:
    """A model with updates that are in its caches only, and its rows."""
    model = sharded(case)
    before = rows(model)
    train(model, case, 0, 3)
    after = rows(model)
    assert all(np.abs(after[key] - before[key]).max() > 0.1 for key in after if len(after[key]))
    return model, after


def assert_kept(model: Any, want: Rows, atol: float = STEP, but: str = "") -> None:
    found = rows(model)
    for key, values in want.items():
        if key[0] != but:
            np.testing.assert_allclose(found[key], values, rtol=0, atol=atol, err_msg=str(key))


def load_nothing() -> None:
    model, want = trained()
    model.load_state_dict({}, strict=False)
    assert_kept(model, want)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*t0.rows8"):
        model.load_state_dict({})
    assert_kept(model, want)
    # Its own tensors: nothing to be loaded.
    state = model.state_dict()
    train(model, CASE, 3, 6)
    want = rows(model)
    model.load_state_dict(state)
    assert_kept(model, want)


def test_what_is_not_loaded_keeps_its_updates(two_ranks: Ranks) -> None:
    two_ranks.run(load_nothing)


def load_some_tables() -> None:
    model, want = trained()
    model.module.ebc.load_state_dict({"embedding_bags.t1.weight": torch.ones(300, 16)}, strict=False)
    assert_kept(model, want, but="t1")
    assert all((np.abs(values - 1) < STEP).all() for key, values in rows(model).items() if key[0] == "t1")
    other, saved = trained()
    state = {key: value for key, value in other.state_dict().items() if ".t0." in key}
    saved = rows(other)
    train(model, CASE, 3, 6)
    want = rows(model)
    model.load_state_dict(state, strict=False)
    assert_kept(model, want, but="t0")
    assert_kept(model, {key: values for key, values in saved.items() if key[0] == "t0"}, atol=0)


def test_other_tables_of_the_tbe_keep_their_updates(two_ranks: Ranks) -> None:
    two_ranks.run(load_some_tables)


def load_weights_of_other_shapes() -> None:
    model, _ = trained()
    model.state_dict()  # rounds the rows
    want = rows(model)
    fits = {"embedding_bags.t0.weight": torch.ones(400, 16)}
    for shape in ((100, 16), (500, 16), (300, 32), (300,)):
        state = {**fits, "embedding_bags.t1.weight": torch.ones(shape)}
        with pytest.raises(ValueError, match=r"table t1 has 300 rows of 16 columns, its weight") as error:
            model.module.ebc.load_state_dict(state, strict=False)
        assert str(list(shape)) in str(error.value)
        assert_kept(model, want, atol=0)


def test_a_weight_of_another_shape_is_refused_before_anything_is_loaded(two_ranks: Ranks) -> None:
    two_ranks.run(load_weights_of_other_shapes)


def load_parts_of_a_table(case: Case) -> None:
    model, _ = trained(case)
    state = model.state_dict()
    of_t0 = sorted(key for key in state if ".t0." in key)
    assert len(of_t0) > 1
    for left_out in of_t0:
        other = sharded(case)
        before = rows(other)
        part = {key.removeprefix("ebc."): value for key, value in state.items() if key != left_out}
        missing = other.module.ebc.load_state_dict(part, strict=False).missing_keys
        assert sorted(missing) == [key.removeprefix("ebc.") for key in of_t0]
        assert_kept(other, {key: values for key, values in before.items() if key[0] == "t0"}, atol=0)
        assert_kept(other, {key: v for key, v in rows(model).items() if key[0] != "t0"}, atol=0)


def test_a_table_with_a_missing_key_is_not_loaded(two_ranks: Ranks) -> None:
    two_ranks.run(load_parts_of_a_table, replace(CASE, cache=replace(SMALL, algorithm=LFU)))
    two_ranks.run(load_parts_of_a_table, replace(CASE, mixed=True))


def turned_counts(case: Case) -> dict[str, Tensor]:
    """As many wide rows of each table, but others."""
    return {table: of_rows.flip(0) for table, of_rows in counts(case).items()}


def load_under_another_plan() -> None:
    case = replace(CASE, mixed=True)
    model, _ = trained(case)
    state = model.state_dict()
    digest = state["ebc.embedding_bags.t0.wide_rows_digest"]
    assert int(digest) == int(
        sharded(replace(case, sharding=(CW,))).state_dict()["ebc.embedding_bags.t0.wide_rows_digest"]
    )
    same = sharded(case)
    same.load_state_dict(state)
    assert_kept(same, rows(model), atol=0)
    with mock.patch.object(cached_cases, "counts", turned_counts):
        other = sharded(case)
    want = rows(other)
    with pytest.raises(ValueError, match="table t0 stores other rows in 8 bits here than when its state was saved"):
        other.load_state_dict(state)
    assert_kept(other, want, atol=0)


def test_another_precision_plan_is_refused(two_ranks: Ranks) -> None:
    two_ranks.run(load_under_another_plan)


def load_between_forward_and_backward() -> None:
    saved = trained()[0].state_dict()
    model = sharded(CASE)
    want = rows(model)
    pooled = model(local_batch(3, CASE)[0])
    weight = {"embedding_bags.t0.weight": torch.ones(400, 16)}  # which is row-wise, on both ranks
    for load in (
        lambda: model.load_state_dict(saved),
        lambda: model.module.ebc.load_state_dict(weight, strict=False),
        lambda: model.load_state_dict({}, strict=False),
    ):
        with pytest.raises(RuntimeError, match=r"tables .*t0.* have a forward that waits .* `del loss`"):
            load()
        assert_kept(model, want, atol=STEP)
    del pooled
    for part in model.module.ebc.cached_shards():
        if part.name == "t0":  # a prefetched batch has nothing to lose
            part.emb_module.prefetch(torch.arange(9), torch.tensor([0, 4, 9]))
    model.load_state_dict(saved)
    train(model, CASE, 4, 5)


def test_nothing_is_loaded_while_a_batch_is_in_flight(two_ranks: Ranks) -> None:
    two_ranks.run(load_between_forward_and_backward)


def wide_rows_of(wide: Tensor) -> Callable[[str, int, int], Tensor | None]:
    return lambda table, start, stop: wide[start:stop]


def test_a_digest_tells_which_rows_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.zeros(1000, dtype=torch.bool)
    wide[::3] = True
    digest = wide_rows_digest(wide_rows_of(wide), "t", 1000)
    assert digest is not None and 0 <= digest < 2**63
    assert digest != wide_rows_digest(wide_rows_of(wide.roll(1)), "t", 1000)
    assert digest == wide_rows_digest(wide_rows_of(wide.clone()), "t", 1000)
    monkeypatch.setattr("torchrec_mpe.distributed.cached_state._ROWS_PER_CHUNK", 64)
    assert digest == wide_rows_digest(wide_rows_of(wide), "t", 1000)
    for uniform in (torch.zeros(1000, dtype=torch.bool), torch.ones(1000, dtype=torch.bool)):
        assert wide_rows_digest(wide_rows_of(uniform), "t", 1000) is None
    assert wide_rows_digest(lambda table, start, stop: None, "t", 1000) is None
