"""The arithmetic of the lookup benchmark, its tables, and one tiny cell."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from torchrec_mpe.ops import library

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lookup.py"


@pytest.fixture
def lookup(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("lookup", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lookup", module)
    spec.loader.exec_module(module)
    return module


def _record(cell, ratio, dim=64, bits="4", rival="INT4", capability="avx512"):
    case = {"case": cell.name, "dim": dim, "bits": bits, "rival": rival, "capability": capability}
    return {**case, "ratio": ratio, "goal": None, "ns": 10.0, "rival_ns": 10.0 * ratio, "threads": 1}


def test_means_are_geometric_and_stand_beside_their_goals(lookup):
    first, second, other = lookup.GRID[0], lookup.GRID[1], lookup.HOT
    records = [_record(first, 1.0), _record(second, 4.0), _record(other, 100.0)]
    records += [_record(first, 0.5, capability="avx2"), _record(second, 0.5, capability="avx2")]
    records += [_record(cell, 3.0, bits="4", rival="FP16") for cell in (first, second)]  # not shown

    means = lookup.summary(records, "mean", (first, second), lookup.MEAN_GOALS, judge=True)
    found = {record["capability"]: record for record in means}
    assert len(means) == 2
    assert found["avx512"]["case"] == "mean"
    assert found["avx512"]["ratio"] == pytest.approx(2.0)
    assert found["avx512"]["rival_ns"] == pytest.approx(20.0)
    assert (found["avx512"]["goal"], lookup.verdict(found["avx512"])) == (1.5, "reached")
    assert found["avx2"]["ratio"] == pytest.approx(0.5)
    assert (found["avx2"]["goal"], lookup.verdict(found["avx2"])) == (None, "")

    slow = lookup.summary([_record(first, 1.2, dim=128)], "mean", (first,), lookup.MEAN_GOALS, judge=True)
    assert (slow[0]["goal"], lookup.verdict(slow[0])) == (1.25, "missed")
    unjudged = lookup.summary([_record(first, 1.2)], "mean", (first,), lookup.MEAN_GOALS, judge=False)
    assert unjudged[0]["goal"] is None


def test_every_goal_is_of_a_width_and_rival_that_are_measured(lookup):
    measured = {(bits, rival) for widths, rivals in lookup.COMPARED.items() for bits in widths for rival in rivals}
    for goals in (lookup.MEAN_GOALS, lookup.HOT_GOALS, lookup.SINGLE_GOALS):
        assert set(goals) <= measured
        assert all(goal is None or len(goal) == len(lookup.DIMS) for goal in goals.values())
    assert len(lookup.GRID) == 8
    assert {cell.rows for cell in lookup.QUICK_GRID} == {100_000}


@pytest.mark.parametrize("name, bits", [("8", 8.0), ("mixA", 1.36), ("mixB", 0.14)])
def test_shares_are_whole_and_average_as_said(lookup, name, bits):
    assert sum(share for share, _ in lookup.SHARES[name]) == pytest.approx(1.0)
    assert sum(share * width for share, width in lookup.SHARES[name]) == pytest.approx(bits)


def test_ids_are_rows_and_zipf_ids_are_mostly_the_first(lookup):
    def draw(kind):
        ids = lookup.draw_ids(1000, kind, 20_000, torch.Generator().manual_seed(0))
        assert ids.dtype == torch.int32
        assert int(ids.min()) == 0
        return ids

    assert int(draw("hot").max()) == 39
    assert int(draw("uniform").max()) == 999
    zipf = draw("zipf")
    assert int(zipf.max()) <= 999
    # The share of rank 0 under a density of x**-1.05 on [1, 1001).
    share = (1 - 2**-0.05) / (1 - 1001**-0.05)
    assert float((zipf == 0).float().mean()) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("directory", ["ranked", "remap", "nibble", "bitmap"])
def test_repeated_tables_decode_like_the_one_they_repeat(lookup, monkeypatch, directory):
    monkeypatch.setattr(lookup, "TABLES", 1)
    shares = ((0.2, 4), (0.5, 2), (0.3, 0))
    one = lookup.packed_tables(1000, 24, shares, directory)
    three = lookup.repeated(one, 3)
    ids, offsets = torch.arange(0, 1000, 7, dtype=torch.int32), torch.arange(144, dtype=torch.int32)
    expected = lookup.our_lookup(one)(ids, offsets, backend="reference")
    offsets_of_three = torch.arange(3 * 143 + 1, dtype=torch.int32)
    actual = lookup.our_lookup(three)(ids.repeat(3), offsets_of_three, backend="reference")
    assert torch.equal(actual, expected.repeat(1, 3))


def test_options(lookup, capsys):
    options = lookup.parse(["--quick", "--json", "x.json", "--threads", "2"])
    assert (options.quick, options.json, options.threads) == (True, Path("x.json"), 2)
    options = lookup.parse([])
    assert (options.quick, options.json, options.threads) == (False, None, 1)
    with pytest.raises(SystemExit):
        lookup.parse(["--threads", "0"])
    assert "--threads must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.skipif(not library.is_loaded(), reason="measures the compiled op")
def test_tiny_cells(lookup, monkeypatch):
    monkeypatch.setattr(lookup, "TABLES", 2)
    monkeypatch.setattr(lookup, "BATCH", 4)
    monkeypatch.setattr(lookup, "DIMS", (16,))
    cells = (lookup.Cell(200, "zipf", 3), lookup.Cell(200, "uniform", 1, out=True))
    with torch.no_grad():
        records = [record for group in lookup.measure_cells(cells, (0.0, 1)) for record in group]
    native = library.cpu_capability()
    used = [record for record in records if record["capability"] == native]
    assert len(used) == 2 * 11  # cells, pairs of a width and a rival, two of them coded
    assert all(record["ratio"] > 0 and record["ns"] > 0 and record["rival_ns"] > 0 for record in used)
    assert library.cpu_capability() == native

    lines = lookup.cells_table(records, native).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["200 rows, zipf, L=3", "200 rows, uniform, L=1, out="]
    means = lookup.summary(records, "mean", cells, lookup.MEAN_GOALS, judge=True)
    assert len(lookup.ratios_table(means, native).splitlines()) == 1 + 11


@pytest.mark.skipif(not library.is_loaded(), reason="compares the compiled op")
def test_wrong_lookups_are_named(lookup, monkeypatch):
    monkeypatch.setattr(lookup, "TABLES", 2)
    packed = lookup.packed_tables(100, 16, lookup.SHARES["3"])
    lookup.verify("3 bits", packed)
    true_lookup = lookup.our_lookup(packed)

    def one_too_much(ids, offsets, **chosen):
        return true_lookup(ids, offsets, **chosen) + (0 if chosen else 1)

    monkeypatch.setattr(lookup, "our_lookup", lambda packed: one_too_much)
    with pytest.raises(AssertionError, match=r"3 bits with \w+: not what the reference op says"):
        lookup.verify("3 bits", packed)
