"""Means and standard errors over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrec_mpe.app.report.data import unique

_ALWAYS = ("logloss", "average_bits", "embedding_bytes", "compression_ratio", "seconds")


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, None when fewer than two numbers went in."""

    mean: float
    error: float | None = None


@dataclass(frozen=True)
class MethodSummary:
    """One method over its seeds; ``delta`` is its AUC less fp32's, None for fp32 itself and without fp32. The last
    three are of methods that train with a cache, and of fp32 but for the hit rate; else None."""

    method: str
    seeds: int
    auc: Estimate
    delta: Estimate | None
    logloss: Estimate
    average_bits: Estimate
    embedding_bytes: Estimate
    compression_ratio: Estimate
    seconds: Estimate
    training_bytes: Estimate | None = None
    training_ratio: Estimate | None = None
    hit_rate: Estimate | None = None


def estimate(values: Iterable[float | None]) -> Estimate:
    """Mean and standard error (sample standard deviation over the root of the number); a None counts as NaN."""
    numbers = [math.nan if value is None else float(value) for value in values]
    count = len(numbers)
    if count == 0:
        return Estimate(math.nan)
    mean = math.fsum(numbers) / count
    if count == 1:
        return Estimate(mean)
    return Estimate(mean, math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (count - 1) / count))


def baseline_method(results: Sequence[Mapping[str, Any]]) -> str | None:
    """The method to compare with: "fp32", else the first one of 32 bits on average, else None."""
    methods = unique(str(row["method"]) for row in results)
    full = [str(row["method"]) for row in results if row["average_bits"] is not None and row["average_bits"] >= 32]
    return "fp32" if "fp32" in methods else next(iter(full), None)


def difference(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Estimate:
    """``ours`` less ``theirs``, each by seed: seed by seed if the seeds are the same, else of the means."""
    if set(ours) == set(theirs):
        return estimate(ours[seed] - theirs[seed] for seed in ours)
    a, b = estimate(ours.values()), estimate(theirs.values())
    known = a.error is not None and b.error is not None
    return Estimate(a.mean - b.mean, math.hypot(a.error or 0.0, b.error or 0.0) if known else None)


def summarize(results: Sequence[Mapping[str, Any]]) -> list[MethodSummary]:
    """One summary per method, in order of first mention."""
    baseline = baseline_method(results)

    def auc_by_seed(method: str) -> dict[Any, float]:
        rows = [row for row in results if str(row["method"]) == method]
        return {row["seed"]: math.nan if row["auc"] is None else float(row["auc"]) for row in rows}

    summaries = []
    for method in unique(str(row["method"]) for row in results):
        rows = [row for row in results if str(row["method"]) == method]
        compare = baseline is not None and method != baseline
        trained = [row for row in rows if "training_bytes" in row]
        cached = [row for row in rows if "hit_rate" in row]
        summaries.append(
            MethodSummary(
                method=method,
                seeds=len(rows),
                auc=estimate(row["auc"] for row in rows),
                delta=difference(auc_by_seed(method), auc_by_seed(baseline)) if compare and baseline else None,
                **{key: estimate(row[key] for row in rows) for key in _ALWAYS},
                training_bytes=estimate(row["training_bytes"] for row in trained) if trained else None,
                training_ratio=estimate(row["fp32_training_bytes"] / row["training_bytes"] for row in trained)
                if trained
                else None,
                hit_rate=estimate(row["hit_rate"] for row in cached) if cached else None,
            )
        )
    return summaries
