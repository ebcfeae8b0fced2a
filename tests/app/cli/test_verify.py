"""`torchrec-mpe verify` and `torchrec-mpe inspect` of artifacts."""

from pathlib import Path

import pytest

import torchrec_mpe as mpe
from tests.inference.liars import TABLES, edit_tensors, emitted
from torchrec_mpe.app.cli.main import main


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    mpe.save(emitted(), tmp_path / "artifact", metadata={"auc": 0.75, "terminal": "\x1b[31m"})
    return tmp_path / "artifact"


def test_verify_says_ok(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(artifact)]) == 0
    size = sum(file.stat().st_size for file in artifact.glob("*.safetensors"))
    assert capsys.readouterr().out == f"{artifact}: OK, 3 tables, 7 dense tensors, 2 files of {size:,} bytes\n"


def test_verify_finds_what_inspect_does_not_read(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_tensors(artifact, lambda t: t["directory"].view(-1, 64)[-1].fill_(0x99))
    assert main(["inspect", str(artifact)]) == 0
    capsys.readouterr()
    assert main(["verify", str(artifact)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("torchrec-mpe: error: ") and "table t3" in captured.err


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_one_sentence_and_exit_code_2(artifact: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = (artifact / TABLES).read_bytes()
    (artifact / TABLES).write_bytes(data[:-1])
    wrong = [artifact, artifact / "nothing", artifact.parent, artifact / TABLES]
    for path in wrong:
        assert main([command, str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    (artifact / TABLES).unlink()
    assert main([command, str(artifact)]) == 2
    assert f"{artifact} is incomplete: {TABLES} is missing" in capsys.readouterr().err


def test_inspect_shows_tables_widths_and_bytes(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artifact)]) == 0
    out = capsys.readouterr().out
    report = mpe.load(artifact).size_report()
    assert str(report) in out and "\x1b" not in out
    assert 'metadata: {"auc": 0.75, "terminal": "\\u001b[31m"}' in out
    assert "t2: ranked, 1 of 0 bits, 1 of 1 bits" in out
    assert "dense: 7 tensors, " in out and "written by: " in out and f"torchrec-mpe {mpe.__version__}" in out
