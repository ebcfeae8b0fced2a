"""Progress bars in a terminal and in a file."""

import io
import sys

import pytest

from torchrec_mpe.files import progress
from torchrec_mpe.files.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("seconds", "least", "most"), [(30.0, 2, 2), (0.0, 900, 1002)])
def test_a_file_gets_lines(monkeypatch: pytest.MonkeyPatch, seconds: float, least: int, most: int) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(progress, "_SECONDS_A_LINE", seconds)
    with progress_bar(total=1000, desc="reading", leave=False, miniters=1) as bar:
        for _ in range(1000):
            bar.update()
    written = file.getvalue()
    assert "\r" not in written and least <= len(written.splitlines()) <= most
    assert written.splitlines()[0].startswith("reading:   0%") and written.splitlines()[-1].startswith("reading: 100%")


def test_a_terminal_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress_bar(range(3))) == [0, 1, 2]
    assert terminal.getvalue().count("\r") >= 2
