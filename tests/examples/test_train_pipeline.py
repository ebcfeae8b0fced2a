"""The example with TorchRec's train pipeline, on one rank in this process."""

import re
import runpy
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import torchrec_mpe as mpe

_EXAMPLE = Path(__file__).parents[2] / "examples" / "train_pipeline.py"


def test_trains_both_phases_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    bits = []
    for penalized in (True, False):
        if not penalized:
            monkeypatch.setattr(mpe, "add_bit_penalty_", lambda model: model, raising=False)
        (tmp_path / str(penalized)).mkdir()
        monkeypatch.chdir(tmp_path / str(penalized))
        try:
            with torch.random.fork_rng():
                runpy.run_path(str(_EXAMPLE), run_name="__main__")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        printed = capsys.readouterr().out
        assert len(re.findall(r"rank 0: loss 0\.[67]", printed)) == 2
        bits.append(float(re.findall(r"^all .* ([\d.]+) +[\d,]+ +[\d.]+x$", printed, re.MULTILINE)[0]))
    assert mpe.load("artifact") is not None
    assert bits[0] < bits[1], "the penalty inside the pipeline lowers bits"
