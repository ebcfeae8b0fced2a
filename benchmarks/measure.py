"""What the benchmarks share: interleaved timing, medians, and what is written beside the figures."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from torchrec_mpe.app.hardware import cpu_name
from torchrec_mpe.ops import library


def interleave(
    callables: Mapping[str, Callable[[], object]], seconds: float, min_rounds: int = 5, warm: bool = False
) -> dict[str, list[float]]:
    """Time callables in turns, so that a slow moment of a shared machine hits them alike.

    Every callable runs once untimed first. A callable that is meant to see new data at each call rotates it itself.

    Args:
        callables (Mapping[str, Callable[[], object]]): by name.
        seconds (float): about how long to measure, all callables together.
        min_rounds (int): turns that are made in any case.
        warm (bool): call each once untimed before each timed call too, so that none pays for what the one before it
            did to caches and allocator.

    Returns:
        Dict[str, List[float]]: seconds of each call, by name, as many of each.
    """
    for call in callables.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in callables}
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < stop:
        for name, call in callables.items():
            if warm:
                call()
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each callable's seconds."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(times: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """How many times ``fast`` fits into ``slow``: the median over the rounds, each of which saw the same machine."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def versions() -> dict[str, Any]:
    """Hardware and software that the figures were measured on."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": library.cpu_capability() if library.is_loaded() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, cases: Sequence[Mapping[str, Any]]) -> None:
    """Write one object per measured case, each with :func:`versions`, over which what a case says itself prevails."""
    beside = versions()
    path.write_text(json.dumps([{**beside, **case} for case in cases], indent=2) + "\n")
