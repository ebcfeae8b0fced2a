"""Paired changes of AUC by hand, and the bytes of rivals."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from compress_summary import changes, table
from rivals import fbgemm_int, magnitude_pruning, product_quantization


def record(method: str, seed: int, auc: float, seconds: float = 10.0, after: float = 0.0) -> dict[str, object]:
    sizes = {"embedding_bytes": 100, "compression_ratio": 4.0}
    return {"method": method, "seed": seed, "auc": auc, "seconds": seconds, "seconds_after_training": after, **sizes}


def test_changes_are_paired_by_seed() -> None:
    """Changes -0.001 and -0.003: mean -0.002, deviations 0.001, error sqrt(2e-6) / sqrt(2) = 0.001."""
    records = [record("fp32", 0, 0.7), record("fp32", 1, 0.8, 20.0)]
    records += [record("coded:9", 1, 0.797, after=10.0), record("coded:9", 0, 0.699, after=10.0)]
    found = changes(records)["coded:9"]
    assert found["change"] == pytest.approx(-0.002) and found["error"] == pytest.approx(0.001)
    assert found["epochs"] == pytest.approx((10 / 10 + 10 / 20) / 2)
    assert "| coded:9 | 0.7480 | -0.0020 ± 0.0010 | 100 | 4.0x | 0.75 |" in table(records)


def test_rivals_count_their_bytes() -> None:
    rows = {"a": torch.randn(500, 16, generator=torch.Generator().manual_seed(0)), "b": torch.ones(8, 16)}
    for bits, row_bytes in ((8, 16 + 8), (4, 8 + 4), (2, 4 + 4)):
        read, size = fbgemm_int(bits)(rows)
        assert size == 508 * row_bytes and float((read["a"] - rows["a"]).abs().max()) < 8 / 2**bits
    read, size = magnitude_pruning(16)(rows)
    assert size <= 4 * 508 * 16 / 16 and size == 6 * int((read["a"] != 0).sum() + (read["b"] != 0).sum())
    kept = rows["a"].abs() > 3
    torch.testing.assert_close(read["a"][kept], rows["a"][kept].half().float())


def test_product_quantization_stays_below_its_bytes() -> None:
    pytest.importorskip("faiss")
    rows = {"a": torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)), "b": torch.ones(8, 16)}
    read, size = product_quantization(20)(rows)
    assert size <= 4 * 2008 * 16 / 20 + 4 * 16
    assert float((read["a"] - rows["a"]).square().mean()) < 0.9 and torch.equal(read["b"], rows["b"])
