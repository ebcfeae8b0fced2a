"""Jobs with killed ranks end as the same job left alone, bit for bit; a stopped rank ends in a sentence."""

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.app.launch.jobs import TORCHRUN, RunningJob, alive, steps
from torchrec_mpe.app.data.synthetic import write_synthetic_log
from torchrec_mpe.precision.plan import PrecisionPlan

# Jobs are started anew several times: on a busy machine that takes minutes.
pytestmark = pytest.mark.timeout(600)

_EVERY = 9
_STEPS = 50  # of a phase: 3,200 training rows, 32 a rank
_LOG = ["--format", "criteo", "--data", "log.tsv"]
_TRAINING = [
    "--split", "chronological", "--batch-size", "32", "--dim", "4", "--checkpoint-every", str(_EVERY),
    "--log-every", "1", "--device", "cpu",
]  # fmt: skip
_PIPELINE = [*_TRAINING, "--resets", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jobs")
    write_synthetic_log(path / "log.tsv", rows=4000, progress=False)
    return path


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    command = [*TORCHRUN, "-m", "torchrec_mpe.app.launch.trainer", "pipeline", *_LOG, *_PIPELINE, "--out", "alone"]
    with RunningJob(command, folder, "alone") as job:
        assert job.end(180) == 0, job.text
    return folder / "alone"


@pytest.fixture(scope="module")
def stopped(folder: Path, uninterrupted: Path) -> Iterator[RunningJob]:
    """A search whose rank 1 was stopped in the middle."""
    data = ["--format", "prepared", "--data", str(uninterrupted / "search" / "data")]
    command = [*TORCHRUN, "-m", "torchrec_mpe.app.launch.trainer", "search", *data, *_TRAINING[2:], "--out", "stopped"]
    with RunningJob([*command, "--timeout", "4"], folder, "stopped") as job:
        job.wait_for(lambda: len(steps(folder / "stopped" / "steps.jsonl")) >= 20, 120)
        os.kill(job.pids()[0][1], signal.SIGSTOP)
        yield job


def test_a_rank_names_the_one_it_waits_for(stopped: RunningJob) -> None:
    stopped.wait_for(lambda: "torchrec-mpe: error" in stopped.text, 90)
    (sentence,) = re.findall(r"torchrec-mpe: error: (.*)", stopped.text)
    assert re.match(r"rank 0 waited 4 s after step \d+ of search for rank 1: a rank has stopped or is much", sentence)


def kill_ranks(job: RunningJob, out: Path, victims: list[tuple[str, str, int, int]]) -> None:
    """Kill ranks with SIGKILL, each (stage, phase, rank, step) as soon as that step is logged."""
    for restart, (stage, phase, rank, step) in enumerate(victims):
        job.wait_for(partial(reached, out / stage / "steps.jsonl", restart, phase, step), 160)
        os.kill(job.pids()[restart][rank], signal.SIGKILL)


def reached(log: Path, restart: int, phase: str, step: int) -> bool:
    return any(line["restart"] == restart and line["phase"] == phase and line["step"] >= step for line in steps(log))


def losses(out: Path) -> dict[tuple[str, int], list[float]]:
    """Every logged loss by phase and step; a step that was trained again has several."""
    found: dict[tuple[str, int], list[float]] = {}
    for line in steps(out / "search" / "steps.jsonl") + steps(out / "retrain" / "steps.jsonl"):
        if "loss" in line:
            found.setdefault((line["phase"], line["step"]), []).append(line["loss"])
    return found


def content(artifact: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in artifact.iterdir() if file.name != "manifest.json"}


def test_killed_ranks_change_nothing(folder: Path, uninterrupted: Path) -> None:
    """Launched with torchx as a user would; ranks are killed at random steps, perhaps while a checkpoint is written."""
    choose = random.Random(7)
    victims = [
        (stage, phase, choose.randrange(2), choose.randrange(2 * _EVERY + 1, _STEPS - 12))
        for stage, phase in (("search", "search"), ("retrain", "retrain 1 of 2"), ("retrain", "retrain 2 of 2"))
    ]
    command = [
        "torchx", "run", "-s", "local_cwd", "torchrec_mpe.app.launch:pipeline", "-j", "1x2", "--max_restarts",
        str(len(victims)), *_LOG, "--out", "killed", "--", *_PIPELINE, "--checkpoint-asynchronously",
    ]  # fmt: skip
    killed = folder / "killed"
    with RunningJob(command, folder, "killed") as job:
        kill_ranks(job, killed, victims)
        assert job.end(180) == 0, job.text
        assert not any(alive(pid) for pids in job.pids() for pid in pids.values())
    assert len(job.pids()) == len(victims) + 1

    alone = losses(uninterrupted)
    assert len(alone) == 3 * _STEPS and all(len(values) == 1 for values in alone.values())
    for place, values in losses(killed).items():
        assert set(values) == set(alone[place]), place
    assert losses(killed).keys() == alone.keys()

    # Each start went on from a checkpoint of the phase that it was killed in, not from the phase's beginning.
    for restart, (stage, phase, _, step) in enumerate(victims, 1):
        first = next(line for line in steps(killed / stage / "steps.jsonl") if line["restart"] == restart)
        assert first["phase"] == phase and first["step"] % _EVERY == 1 and step - 2 * _EVERY < first["step"] <= _STEPS

    for stage in ("search", "retrain"):
        assert PrecisionPlan.load(killed / stage / "plan.json") == PrecisionPlan.load(
            uninterrupted / stage / "plan.json"
        )
        assert (killed / stage / "results.json").read_text() == (uninterrupted / stage / "results.json").read_text()
    assert content(killed / "artifact") == content(uninterrupted / "artifact")
    assert result(killed) == result(uninterrupted)


def result(out: Path) -> Any:
    return json.loads((out / "artifact" / "manifest.json").read_text())["metadata"]["result"]


def test_the_job_of_a_stopped_rank_ends(stopped: RunningJob) -> None:
    """torchelastic gives the stopped rank 30 s to end, then kills it."""
    assert stopped.end(120) != 0
    assert not any(alive(pid) for pid in stopped.pids()[0].values())
