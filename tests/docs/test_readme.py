"""The diff of a training script is that of the examples, and the commands of the pages are commands."""

import re
import signal
from pathlib import Path

import pytest

from torchrec_mpe.app.cli.main import main

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text()


def _code(line: str) -> str:
    return line.partition("  #")[0].strip()


def test_the_diff_is_that_of_the_examples() -> None:
    commands = (_ROOT / "docs" / "commands.md").read_text()
    diff = re.search(r"^```diff\n(.*?)^```", commands, re.DOTALL | re.MULTILINE)
    assert diff is not None
    plain, swapped = (
        {_code(line) for line in (_ROOT / "examples" / f"{name}.py").read_text().splitlines()}
        for name in ("plain_torchrec", "swap_in")
    )
    for line in diff[1].splitlines():
        code = _code(line[1:])
        if code != "...":
            assert (code in plain) or line[0] == "+", line
            assert (code in swapped) or line[0] == "-", line


def test_commands_are_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # which main() sets for its process
    pages = _README + (_ROOT / "docs" / "commands.md").read_text()
    commands = set(re.findall(r"^(?:\.venv/bin/)?torchrec-mpe ([a-z]+)", pages, re.MULTILINE))
    assert commands == {"demo", "run", "prepare", "plan", "compress", "convert", "inspect", "verify", "doctor"}
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and command in capsys.readouterr().out
