"""The arithmetic of the GPU benchmark, which needs no GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_lookup.py"


@pytest.fixture
def gpu_lookup(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("gpu_lookup", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_lookup", module)
    spec.loader.exec_module(module)
    return module


def test_sectors_are_counted_once_and_whole(gpu_lookup):
    def count(*rows):
        starts, sizes = (torch.tensor(column) for column in zip(*rows, strict=True))
        return gpu_lookup.distinct_sectors(starts, sizes)

    assert count((0, 1)) == 1
    assert count((31, 1), (0, 32)) == 1
    assert count((31, 2)) == 2  # across an edge
    assert count((64, 128)) == 4
    assert count((60, 8), (64, 8)) == 2  # two rows share one
    assert count((5, 0), (500, 0)) == 0  # 0 bits
    assert count((0, 0), (96, 40)) == 2


def test_floor_of_a_batch(gpu_lookup):
    # 3 sectors, 10 ids, 4 bags, 4 bags of 16 columns.
    assert gpu_lookup.floor_bytes(3, 10, 4, 64) == 96 + 40 + 20 + 256


def test_runs_are_aligned_and_sized(gpu_lookup):
    runs = gpu_lookup.ranked_runs(1000, 16, gpu_lookup.MIX)
    assert runs.firsts == (0, 50, 150, 400)
    assert runs.bits == (6, 4, 2, 0)
    assert runs.row_bytes == (12, 8, 4, 0)
    assert runs.bases == (0, 640, 1472, 0)  # 600, 800 and 1000 bytes, each to a multiple of 64
    assert runs.table_bytes == 2496


def test_results_are_ratios_with_goals(gpu_lookup):
    case = gpu_lookup.Case(2048, 26, 1_000_000, 64)
    seconds = {**dict.fromkeys(gpu_lookup.WIDTHS, 2e-5), "INT8": 4e-5, "INT4": 3e-5, "INT2": 2e-5, "EmbeddingBag": 1e-4}
    rows = gpu_lookup.results(case, seconds, dict.fromkeys(seconds, 40_000_000), 4e12)
    found = {(row["bits"], row["rival"]): (round(row["ratio"], 6), row["goal"]) for row in rows}
    assert found[("8", "INT8")] == (2.0, 1.0)
    assert found[("8", "EmbeddingBag")] == (5.0, 1.0)
    assert found[("1", "INT2")] == (1.0, 1.0)
    assert found[("mix", "floor")] == (0.5, 0.7)
    assert all({"case", "dim", "bits", "rival", "ratio", "goal"} <= row.keys() for row in rows)
    assert len(gpu_lookup.table(rows).splitlines()) == 1 + len(rows)
    narrow = gpu_lookup.results(gpu_lookup.Case(1, 1, 1, 16), seconds, dict.fromkeys(seconds, 1), 1.0)
    assert {row["goal"] for row in narrow if row["rival"] == "floor"} == {None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_one_sentence_and_status_2():
    done = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "gpu_lookup.py measures on a CUDA GPU, and torch sees none here\n"
    assert done.stdout == ""
