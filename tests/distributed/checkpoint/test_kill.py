"""A process killed at any moment of a save leaves a checkpoint to load."""

import multiprocessing
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchrec_mpe as mpe
from tests.distributed.checkpoint.runs import TW, Model, Run, Training
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.distributed.checkpoint import checkpoints as checkpoints_module
from torchrec_mpe.distributed.checkpoint import folder as folder_module
from torchrec_mpe.precision.from_frequencies import uniform_precision

RUN = Run("retrain", (TW,))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, calls: int = 1) -> None:
    """Kill this process when a function is called for the ``calls``-th time."""
    function, seen = getattr(owner, name), [0]

    def replacement(*arguments: Any, **named: Any) -> Any:
        seen[0] += 1
        if seen[0] == calls:
            kill()
        return function(*arguments, **named)

    setattr(owner, name, replacement)


def after(owner: Any, name: str) -> None:
    """Kill this process when a function has returned."""
    function = getattr(owner, name)

    def replacement(*arguments: Any, **named: Any) -> Any:
        function(*arguments, **named)
        kill()

    setattr(owner, name, replacement)


def remove_half(path: Any, *arguments: Any, **named: Any) -> None:
    """rmtree that is killed after one file."""
    files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
    if not files:  # what is left of a hidden folder when its file is in place
        return Path(path).rmdir()
    files[0].unlink()
    kill()


def _filesystem() -> Any:
    from torch.distributed.checkpoint import filesystem

    return filesystem


# What happens in the second save, and which step is newest then. The first save's plan is another one, keep is 1.
POINTS: dict[str, tuple[Callable[[], None], int]] = {
    "folder made": (lambda: after(folder_module.CheckpointFolder, "begin"), 1),
    "plan half shared": (lambda: before(folder_module, "file_sha256"), 1),
    "plan shared": (lambda: after(folder_module.CheckpointFolder, "share"), 1),
    "tensors half written": (lambda: before(_filesystem(), "_write_item", 5), 1),
    "tensors written": (lambda: before(_filesystem().FileSystemWriter, "finish"), 1),
    "no manifest": (lambda: before(checkpoints_module, "write_manifest"), 1),
    "manifest written": (lambda: after(checkpoints_module, "write_manifest"), 1),
    "not renamed": (lambda: before(Path, "rename", 2), 1),  # the first is the plan's
    "renamed": (lambda: after(Path, "rename"), 1),  # of the plan
    "complete": (lambda: before(folder_module.CheckpointFolder, "_remove"), 2),
    "old one half removed": (lambda: setattr(shutil, "rmtree", remove_half), 2),
    "old plan not removed": (lambda: before(folder_module.CheckpointFolder, "_remove", 2), 2),
}


def save_and_be_killed(folder: str, point: str) -> None:
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        training = Training(RUN)
        training.steps(0, 1)
        checkpoints = mpe.Checkpoints(folder, keep=1)
        training.save(checkpoints, 1)
        other = uniform_precision(training.model.module.ebc.embedding_bag_configs(), 3)
        mpe.prepare_retrain_(training.model, other)
        training.start()
        POINTS[point][0]()
        training.save(checkpoints, 2, plan=other)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int | None]]:
    """One process for each point; the server imports everything once and forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.checkpoint.test_kill"])
    results: dict[str, tuple[Path, int | None]] = {}
    for point in POINTS:
        folder = tmp_path_factory.mktemp("killed")
        process = context.Process(target=save_and_be_killed, args=(str(folder), point), daemon=True)
        process.start()
        process.join(timeout=100)
        if process.is_alive():
            process.kill()
            process.join()
        results[point] = folder, process.exitcode
    return results


@pytest.mark.parametrize("point", POINTS)
def test_killed_save(point: str, killed: dict[str, tuple[Path, int | None]], one_rank: None) -> None:
    folder, exit_code = killed[point]
    assert exit_code == -signal.SIGKILL, "the process must have come to the point"
    left = {entry.name for entry in folder.iterdir()}
    checkpoints = mpe.Checkpoints(folder, keep=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "passed over")  # nothing that looks like a checkpoint may be half of one
        found = checkpoints.newest()
    assert found is not None and found.step == POINTS[point][1]
    training = Training(RUN, found.prepare_(Model(RUN)))
    training.load(checkpoints, found)
    assert all(np.isfinite(training.steps(0, 1)))
    training.save(checkpoints, 3, plan=found.plan())
    names = sorted(entry.name for entry in folder.iterdir())
    assert len(names) == 2 and names[0].endswith("-retrain-step-3") and names[1].startswith("plan-"), (left, names)
