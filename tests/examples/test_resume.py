"""The examples on two ranks: resume.py, with a rank killed in each phase, trains to the losses of swap_in.py."""

import os
import re
import signal
from pathlib import Path

import pytest

import torchrec_mpe as mpe
from tests.app.launch.jobs import TORCHRUN, RunningJob

# Jobs are started anew several times: on a busy machine that takes minutes.
pytestmark = pytest.mark.timeout(600)

_NUMBER = r"([\d.]+)"  # two ranks may print on one line
_EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_killed_resume_trains_as_swap_in(tmp_path: Path) -> None:
    for name in ("swap_in", "resume"):
        (tmp_path / name).mkdir()
    with RunningJob([*TORCHRUN, str(_EXAMPLES / "swap_in.py")], tmp_path / "swap_in", "output") as job:
        assert job.end(200) == 0, job.text
        expected = {rank: re.findall(rf"rank {rank}: loss {_NUMBER}", job.text) for rank in "01"}

    command = [*TORCHRUN, "--max-restarts", "2", str(_EXAMPLES / "resume.py")]
    with RunningJob(command, tmp_path / "resume", "output", {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}) as job:
        for rank, (phase, step) in enumerate((("search", 10), ("retrain", 13))):
            job.wait_for(lambda line=f"rank {rank}: {phase} step {step} loss": line in job.text, 120)
            (process,) = re.findall(rf"rank {rank}: process (\d+)", job.text)[-1:]
            os.kill(int(process), signal.SIGKILL)
        assert job.end(200) == 0, job.text
        text = job.text
    for phase, step in (("search", 8), ("retrain", 8)):
        assert re.search(rf"rank 1: {phase} goes on after step {step}(?!\d)", text)
    for rank, losses in expected.items():
        got = [
            set(re.findall(rf"rank {rank}: {phase} step 20 loss {_NUMBER}", text)) for phase in ("search", "retrain")
        ]
        assert [[f"{float(loss):.4f}" for loss in values] for values in got] == [[loss] for loss in losses]
    for name in ("swap_in", "resume"):
        mpe.load(tmp_path / name / "artifact")
