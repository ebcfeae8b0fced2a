"""Bytes go where they save error: budgets met, never exceeded, and errors as promised."""

from dataclasses import replace

import pytest
import torch

from tests.coding.tables import trained
from torchrec_mpe.coding.allocation import allocate
from torchrec_mpe.coding.candidates import TableCandidates, TableChoice
from torchrec_mpe.coding.owned_rows import WholeTable
from torchrec_mpe.coding.size import coded_bytes


def candidates(seed: int = 0) -> list[TableCandidates]:
    """A large, a wide and a small table."""
    tables = [trained(4000, 16, seed, "a", unseen=300), trained(300, 48, seed, "b"), trained(5, 3, seed, "c", unseen=1)]
    return [TableCandidates(t, 8) for t in tables]


def fp32_bytes(tables: list[TableCandidates]) -> int:
    return sum(4 * t.rows * t.dim for t in tables)


def total(tables: list[TableCandidates], choices: list[TableChoice]) -> int:
    return coded_bytes(t.runs(c) for t, c in zip(tables, choices, strict=True))


def error(choices: list[TableChoice]) -> float:
    return sum(c.error for c in choices)


def test_the_budget_is_used_within_one_percent_and_more_bytes_never_hurt() -> None:
    errors = []
    for ratio in (10, 20, 33, 60, 100, 150, 200):
        tables = candidates()
        budget = fp32_bytes(tables) // ratio
        choices = allocate(tables, budget)
        assert min(0.99 * budget, budget - 64) <= total(tables, choices) <= budget
        errors.append(error(choices))
    assert errors == sorted(errors) and errors[0] < 0.02 * errors[-1]


def test_one_price_is_better_than_one_ratio_for_all_tables() -> None:
    tables = candidates()
    budget = fp32_bytes(tables) // 20
    jointly = error(allocate(tables, budget))
    alone = 0.0
    for k in range(2):
        table = candidates()[k]
        alone += error(allocate([table], fp32_bytes([table]) // 20))
    assert jointly < alone


def test_all_singletons_alike_are_split_to_use_the_budget() -> None:
    table = replace(trained(20000, 8), counts=torch.ones(20000, dtype=torch.int64))
    for budget in (3000, 4000, 7000):
        tables = [TableCandidates(table, 8)]
        (choice,) = allocate(tables, budget)
        assert min(0.99 * budget, budget - 64) <= total(tables, [choice]) <= budget
        assert len(choice.groups) <= 3


def test_a_budget_that_is_too_small_says_what_is_needed() -> None:
    tables = candidates()
    with pytest.raises(
        ValueError, match="a budget of 300 bytes cannot be met: without any bits the tables take"
    ) as found:
        allocate(tables, 300)
    smallest = int(str(found.value).split("take ")[1].split(" bytes")[0].replace(",", ""))
    choices = allocate(candidates(), smallest)
    assert total(tables, choices) <= smallest
    with pytest.raises(ValueError, match="cannot be met"):
        allocate(candidates(), smallest - 1)


def test_rows_that_are_all_alike_take_no_more_bytes_than_none() -> None:
    table = replace(trained(100, 8), rows=WholeTable(torch.full((100, 8), 0.5)))
    tables = [TableCandidates(table, 8)]
    (choice,) = allocate(tables, 10000)
    assert error([choice]) == 0 and total(tables, [choice]) < 250


def test_merging_saves_metadata_of_many_small_tables() -> None:
    """Half of the bytes of small tables would be records and levels if each group kept its own."""
    tables = [TableCandidates(trained(rows, 16, seed, str(seed)), 8) for seed, rows in enumerate([60, 90, 200, 400])]
    groups = [len(t.groups) for t in tables]
    budget = fp32_bytes(tables) // 20
    merged = allocate(tables, budget)
    assert [len(t.groups) for t in tables] < groups
    unmerged = [TableCandidates(trained(rows, 16, seed, str(seed)), 8) for seed, rows in enumerate([60, 90, 200, 400])]
    for t in unmerged:
        t.merge_groups = lambda price, blocks: False  # type: ignore[method-assign]
    assert error(merged) < 0.95 * error(allocate(unmerged, budget))


def test_a_table_that_the_loss_does_not_see_gets_next_to_nothing() -> None:
    seen, unseen = trained(2000, 16, 0, "seen"), trained(2000, 16, 1, "unseen")
    tables = [TableCandidates(t, 16) for t in (seen, replace(unseen, curvature=unseen.curvature * 1e-6))]
    choices = allocate(tables, fp32_bytes(tables) // 60)
    assert coded_bytes([tables[1].runs(choices[1])]) < 0.1 * coded_bytes([tables[0].runs(choices[0])])
