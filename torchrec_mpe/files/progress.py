"""Progress bars: redrawn in a terminal, a line now and then in a file."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS_A_LINE = 30.0


class _Lines:
    """Takes what tqdm redraws in place, and writes it line by line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if text.strip():
            self._file.write(text.strip() + "\n")

    def flush(self) -> None:
        self._file.flush()


def progress_bar(*arguments: Any, **options: Any) -> "tqdm[Any]":
    """tqdm with its own arguments, on standard error; where that is no terminal, a line at most every half minute."""
    if not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "mininterval": _SECONDS_A_LINE, "leave": True, "ncols": 100}
    return tqdm(*arguments, **options)
