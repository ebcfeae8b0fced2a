"""What docs/scaling.md says a step sends is what it sends."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.distributed.ranks import Ranks

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def _script() -> ModuleType:
    if BENCHMARKS not in sys.path:
        sys.path.insert(0, BENCHMARKS)
    return importlib.import_module("communication")


def counted(shardings: Sequence[str]) -> Any:
    return _script().count_on_this_rank(shardings)


def _compare(by_rank: list[Any], ranks_per_host: int) -> None:
    script = _script()
    results: list[dict[str, Any]] = []
    for k, (sharding, phase, _) in enumerate(by_rank[0]):
        of_ranks = [of_rank[k][2] for of_rank in by_rank]
        results += script.check(sharding, phase, len(by_rank), ranks_per_host, of_ranks)
    assert results and all(r["expected"] > 0 for r in results)
    assert {r["case"]: r["counted"] for r in results} == {r["case"]: r["expected"] for r in results}


def test_formulas_at_two_ranks(two_ranks: Ranks) -> None:
    _compare(two_ranks.run(counted, _script().TWO_RANKS), 2)


def test_formulas_at_four_ranks_on_two_hosts(four_ranks: Ranks) -> None:
    _compare(four_ranks.run(counted, _script().FOUR_RANKS), 2)


def test_packed_tables_on_every_device_send_nothing() -> None:
    script = _script()
    assert script.step_traffic(script.TERABYTE, "data_parallel", 64, 8, 1024, "packed", 10, training=False) == []


@pytest.mark.parametrize(
    ("op", "sent"), [("all-to-all", 75.0), ("reduce-scatter", 75.0), ("all-gather", 300.0), ("all-reduce", 150.0)]
)
def test_bytes_that_leave_a_rank(op: str, sent: float) -> None:
    """Of 100 bytes on four ranks, by hand."""
    assert _script().Traffic("", op, 4, 100).sent == sent
