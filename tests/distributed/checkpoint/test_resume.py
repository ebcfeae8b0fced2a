"""Going on from a checkpoint is as if nothing had happened, also on other ranks and under another sharding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.checkpoint.runs import (
    CW,
    DP,
    ELEMENTWISE,
    NONE,
    ROWWISE,
    RW,
    TABLES,
    TW,
    Run,
    equal,
    load_and_train,
    train_and_save,
    whole,
)
from tests.distributed.ranks import Ranks

AT, UNTIL = 3, 6

RESUMED = [
    Run("search", (TW,)),
    Run("search", (TW, RW, DP)),
    Run("search", (CW,)),
    Run("search", (TW,), tables=TABLES[:1]),  # the other rank has no table
    Run("retrain", (RW,)),
    Run("retrain", (TW, CW, RW), kernel="fused_uvm_caching"),
    Run("retrain in place", (TW,)),
    Run("plain", (TW, RW, CW), ELEMENTWISE),
    Run("plain", (RW,), NONE),
    Run("plain", (RW, CW, TW), kernel="dense"),
]

# (what saves, what loads, whether all fused state can move)
MOVED = [
    (Run("search", (TW,)), Run("search", (RW,)), True),
    (Run("retrain", (RW,)), Run("retrain", (TW,)), True),
    (Run("plain", (TW, RW, RW)), Run("plain", (RW, TW, TW)), True),
    (Run("plain", (RW,), ELEMENTWISE), Run("plain", (CW,), ELEMENTWISE), True),
    (Run("plain", (CW,), ELEMENTWISE), Run("plain", (TW,), ELEMENTWISE), True),
    (Run("plain", (CW,), ROWWISE), Run("plain", (CW,), ROWWISE), True),
    (Run("plain", (TW,), NONE), Run("plain", (CW,), NONE), True),
    (Run("search", (TW, TW, RW)), Run("search", (CW, TW, RW)), False),
    (Run("search", (RW, TW, TW)), Run("search", (RW, DP, TW)), False),
    (Run("plain", (DP, TW, TW)), Run("plain", (TW, TW, TW)), False),
    (Run("plain", (TW,), ROWWISE), Run("plain", (TW,), ELEMENTWISE), False),
    (Run("plain", (TW, RW, CW), kernel="dense"), Run("plain", (RW, TW, RW), kernel="dense"), True),
]


@pytest.fixture(scope="module")
def saved(two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[Run, tuple[str, list[dict[str, Any]]]]:
    """Every run on two ranks, in one go."""
    runs = list(dict.fromkeys([*RESUMED, *(before for before, _, _ in MOVED)]))
    folders = {run: str(tmp_path_factory.mktemp("checkpoints")) for run in runs}
    by_rank = two_ranks.run(train_and_save, [(folders[run], run) for run in runs], AT, UNTIL)
    return {run: (folders[run], [results[k] for results in by_rank]) for k, run in enumerate(runs)}


@pytest.fixture(scope="module")
def resumed(saved: dict[Run, Any], two_other_ranks: Ranks) -> dict[Run, list[dict[str, Any]]]:
    def retrain(run: Run) -> Run:
        return replace(run, phase="retrain") if run.phase == "retrain in place" else run

    by_rank = two_other_ranks.run(load_and_train, [(saved[run][0], retrain(run), True) for run in RESUMED], AT, UNTIL)
    return {run: [results[k] for results in by_rank] for k, run in enumerate(RESUMED)}


@pytest.mark.supports("training: resumed from a checkpoint, bit-equal", "several ranks, gloo")
@pytest.mark.parametrize("run", RESUMED, ids=str)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(run: Run, saved: Any, resumed: Any) -> None:
    for rank, (before, after) in enumerate(zip(saved[run][1], resumed[run], strict=True)):
        assert "error" not in after, after["error"]
        assert after["losses"] == before["losses"], rank
        for when in ("saved", "end"):
            # Whose prepare_ drew other numbers before the load is no matter: the generators are loaded last.
            assert list(equal(before[when], after[when])) == [], (rank, when)
        assert before["losses"] != before["first"], "a run that stands still shows nothing"
        assert not any("seeded anew" in said for said in after["warnings"])


def test_ranks_have_states_of_their_own(saved: Any) -> None:
    """Buffers and generators that differ between ranks must come back to the rank that had them."""
    first, second = saved[RESUMED[0]][1]
    for key in ("norm/running_mean", "rng"):
        assert not np.array_equal(first["saved"][key], second["saved"][key]), key


def check_moved(before: Run, after: Run, states: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> None:
    for kind in ("rows", "fused0"):
        expected, got = whole(states, kind), whole(loaded, kind)
        assert expected.keys() == got.keys()
        for table, values in expected.items():
            np.testing.assert_array_equal(got[table], values, err_msg=f"{kind} of {table}")
            assert values.any()
    for state in loaded:
        for key, value in states[0].items():
            if key.startswith(("dense/", "adam/")) and "embedding_bags" not in key:
                np.testing.assert_array_equal(state[key], value, err_msg=key)
        assert state["groups"] == states[0]["groups"] and state["schedule"] == states[0]["schedule"]
        for key in (key for key in state if key.startswith(("iter/", "lr/"))):
            assert state[key] == next(saved[key] for saved in states if key in saved), key


@pytest.mark.parametrize(("before", "after", "movable"), MOVED, ids=str)
def test_two_ranks_load_into_one(before: Run, after: Run, movable: bool, saved: Any, one_rank: None) -> None:
    folder, ranks = saved[before]
    states = [rank["saved"] for rank in ranks]
    if before.sharding == (CW,) and after.sharding == (CW,):
        after = before  # a world of one cuts the columns as the world of two did
    if movable:
        (result,) = load_and_train([(folder, after, True)], AT, AT + 1)
        check_moved(before, after, states, [result["saved"]])
        assert any("saved by 2 ranks and is loaded by 1" in said for said in result["warnings"])
        return
    refused, partly, without = load_and_train(
        [(folder, after, wanted) for wanted in (True, "where possible", False)], AT, AT + 1
    )
    changed = {
        table
        for (table, _, _), there, here in zip(before.tables, before.types(), after.types(), strict=True)
        if there != here or before.optimizer != after.optimizer
    }
    for table, _, _ in before.tables:
        assert (f"embedding_bags.{table}.weight: " in refused["error"]) == (table in changed)
    assert "optimizer_state=False" in refused["error"]
    rows, fused = whole(states, "rows"), whole(states, "fused0")
    for result, empty in ((partly, changed), (without, set(rows))):
        for table, values in whole([result["saved"]], "rows").items():
            np.testing.assert_array_equal(values, rows[table], err_msg=table)
        for table, values in whole([result["saved"]], "fused0").items():
            if table in empty:
                assert not values.any(), table
            else:
                np.testing.assert_array_equal(values, fused[table], err_msg=table)


def test_one_rank_loads_into_two(tmp_path: Path, two_other_ranks: Ranks, one_rank: None) -> None:
    pairs = [(Run("search", (RW,)), Run("search", (TW,))), (Run("retrain", (TW,)), Run("retrain", (RW, TW, RW)))]
    folders = [str(tmp_path / str(k)) for k in range(len(pairs))]
    alone = train_and_save([(folder, before) for folder, (before, _) in zip(folders, pairs, strict=True)], AT, AT)
    cases = [(folder, after, True) for folder, (_, after) in zip(folders, pairs, strict=True)]
    by_rank = two_other_ranks.run(load_and_train, cases, AT, AT + 1)
    for k, (before, after) in enumerate(pairs):
        check_moved(before, after, [alone[k]["saved"]], [results[k]["saved"] for results in by_rank])
        generators = [results[k]["saved"]["rng"] for results in by_rank]
        assert not np.array_equal(*generators), "ranks must not draw the same numbers"
