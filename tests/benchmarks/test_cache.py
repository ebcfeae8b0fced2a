"""The arithmetic of the cache benchmark, and its parts on tables of a few rows."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from torchrec_mpe.cache.config import CacheConfig

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cache.py"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("cache_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cache_benchmark", module)
    spec.loader.exec_module(module)
    return module


def test_batches(cache: ModuleType) -> None:
    load = cache.Workload(3, 1000, 16, 50, 4)
    ranked, shuffled, uniform = (load.batches(ids, 5) for ids in cache.IDS)
    for ids, offsets in (*ranked, *shuffled, *uniform):
        assert offsets.tolist() == list(range(0, 601, 4)) and ids.shape == (600,)
        assert ids.min() >= 0 and ids.max() < 1000
    assert not any(torch.equal(ranked[0][0], ids) for ids, _ in ranked[1:])

    def most_frequent(batches: Any) -> list[int]:
        of_tables = [torch.cat([ids.chunk(3)[t] for ids, _ in batches]) for t in range(3)]
        return [int(ids.mode().values) for ids in of_tables]

    assert most_frequent(ranked) == [0, 0, 0]
    assert len(set(most_frequent(shuffled))) == 3, "every table has its own order"
    assert ranked[0][0].unique().numel() < uniform[0][0].unique().numel()
    together = load.in_one_table(ranked)
    for t, part in enumerate(together[0][0].chunk(3)):
        assert torch.equal(part - 1000 * t, ranked[0][0].chunk(3)[t])


def test_one_table_is_the_same_lookup(cache: ModuleType) -> None:
    load = cache.Workload(3, 40, 8, 5, 4)
    apart, together = load.fbgemm(), load.fbgemm(one_table=True)
    rows = torch.cat([weights.detach() for weights in apart.split_embedding_weights()])
    together.split_embedding_weights()[0].detach().copy_(rows)
    batches = load.batches("uniform", 1)
    assert torch.equal(apart(*batches[0]), together(*load.in_one_table(batches)[0]))


def test_memory_counts_both_sides(cache: ModuleType) -> None:
    records = {record["case"]: record for record in cache.memory(3000, 2, (16,))}
    fp32, fp16 = records["memory, fp32, D=16"], records["memory, fp16, D=16"]
    state = 4 * 3000
    assert 0 <= fp32["bytes"] - (4 * 16 * 3000 + state) < 1000, "rows, state, and FBGEMM's small tensors"
    assert 0 <= fp16["bytes"] - (2 * 16 * 3000 + state) < 1000
    ours = records["memory, INT4 1% LFU, D=16, zipf ids"]
    assert ours["bytes"] == sum(ours["bytes_by_kind"].values()) and ours["ratio"] == fp32["bytes"] / ours["bytes"]
    assert ours["bytes_by_kind"]["store"] == 3000 * (8 + 2 + 1)
    assert ours["bytes_by_kind"]["spill"] > 0, "one set is too small for a batch"
    assert len(records) == 2 + 2 * len(cache.VARIANTS) and 0 < ours["hit_rate"] < 1


def test_tiny_steps(cache: ModuleType) -> None:
    load = cache.Workload(2, 500, 8, 6, 3)
    records = {record["variant"]: record for record in cache.step_times(load, 3, 2, ("zipf",))}
    whole = {record["variant"]: record for record in cache.step_times(load, 3, 2, ("zipf",), whole=True)}
    assert set(whole) == set(records) and all(record["goal"] is None for record in whole.values())
    assert whole["fp32"]["case"] == "step, with a network, " + records["fp32"]["case"].split(", ", 1)[1]
    assert set(records) == {"fp32", "fp32, one table", "fp16", *cache.VARIANTS}
    assert records["fp32"]["ratio"] == records["fp32, one table"]["ratio_to_one_table"] == 1
    for name in cache.VARIANTS:
        record = records[name]
        assert 0 < record["prefetch_share"] < 1 and 0 <= record["hit_rate"] < 1 and record["goal"] == 1.1
    assert records["fp16"]["goal"] is None and "prefetch_share" not in records["fp16"]


def test_hit_rate_by_hand(cache: ModuleType) -> None:
    """One set of 32: LRU loses what a scan of 32 rows pushes out, LFU keeps the two rows that come most often."""
    often = torch.tensor([0, 1] * 5)
    batches = [part for k in range(20) for part in (often, torch.arange(100 + 32 * k, 132 + 32 * k))]
    lru, lfu = (
        cache.hit_rate(1000, batches, CacheConfig(8, 0.001, a, half_life=float("inf"))) for a in (cache.LRU, cache.LFU)
    )
    assert lru == 0
    assert lfu == pytest.approx(2 / 34), "of a pair of batches, 2 of 34 distinct rows"


def test_hits_without_data(cache: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOAD_FACTORS", (0.05, 1.0))
    monkeypatch.setattr(cache, "LOOKUPS", (16, 4))
    rates = {record["case"]: record["hit_rate"] for record in cache.hits(300, 8, None)}
    assert len(rates) == 4
    for algorithm in ("LRU", "LFU"):
        small, whole = (rates[f"hits, zipf 1.05, 64 lookups, {algorithm} {factor}"] for factor in ("0.05", "1"))
        assert small < whole


def run(variant: str, seed: int, auc: float, **more: float) -> dict[str, Any]:
    return {"variant": variant, "seed": seed, "auc": auc, "training_bytes": 100, "fp32_training_bytes": 300, **more}


def test_changes_of_auc_are_by_seed(cache: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run("fp32", 0, 0.70), run("fp32", 1, 0.72)]
    for name, changes in (("INT8 5% LRU", (-1e-4, -3e-4)), ("INT4 1% LFU", (-12e-4, -8e-4))):
        runs += [
            run(name, seed, auc + change, hit_rate=0.9, auc_before_flush=auc)
            for seed, (auc, change) in enumerate(zip((0.70, 0.72), changes, strict=True))
        ]
    fp32, int8, int4 = cache.auc_records(runs, 16)
    assert fp32["change"] == 0 and fp32["goal"] is None and cache.reached(fp32) is None
    assert int8["change"] == pytest.approx(-2e-4) and int8["change_of_flush"] == pytest.approx(-2e-4)
    assert int8["change_deviation"] == pytest.approx(2**0.5 * 1e-4) and int8["change_error"] == pytest.approx(1e-4)
    assert int8["goal"] == -3e-4 and cache.reached(int8) is True and int8["ratio"] == 3
    assert int4["goal"] == -8e-4 and cache.reached(int4) is False
    cache.show([fp32, int8, int4])
    shown = capsys.readouterr().out
    assert "-3 reached" in shown and "-8 MISSED" in shown
    assert cache.auc_records(runs[::2], 16)[1]["change_error"] is None, "one seed has no spread"


def test_goals_by_section(cache: ModuleType) -> None:
    assert cache.reached({"section": "memory", "ratio": 3.0, "goal": 3.0}) is True
    assert cache.reached({"section": "memory", "ratio": 2.9, "goal": 3.0}) is False
    assert cache.reached({"section": "step", "ratio": 1.09, "goal": 1.1}) is True
    assert cache.reached({"section": "step", "ratio": 1.21, "goal": 1.2}) is False


def test_whole_run(
    cache: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, hits = cache.memory, cache.hits
    monkeypatch.setattr(cache, "memory", lambda rows, steps, dims: memory(500, 2, (16,)))
    monkeypatch.setattr(cache, "LOAD_FACTORS", (0.1,))
    monkeypatch.setattr(cache, "hits", lambda rows, steps, prepared: hits(300, 4, prepared))
    cache.main(["--quick", "--only", "memory", "hits", "--json", str(tmp_path / "x.json")])
    records = json.loads((tmp_path / "x.json").read_text())
    assert all({"section", "case", "ratio", "goal", "reached", "torch"} <= set(record) for record in records)
    shown = capsys.readouterr().out
    assert "no --data" in shown and "hit rate by load factor" in shown and "INT4 1% LFU, D=16, zipf ids" in shown


def test_variants(cache: ModuleType) -> None:
    variants = cache.auc_variants(quick=False)
    assert variants["fp32"] is None and list(cache.auc_variants(quick=True)) == ["fp32", *cache.AUC_GOALS]
    nearest = variants["INT4 1% LFU, nearest"]
    assert nearest == replace(cache.VARIANTS["INT4 1% LFU"], stochastic_rounding=False)
    assert set(cache.AUC_GOALS) <= set(variants) and {name for name, _ in cache.MEMORY_GOALS} <= set(cache.VARIANTS)
    assert set(cache.STEP_GOALS) == set(cache.IDS)
