"""Small logs to prepare."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.data.log import csv_log
from torchrec_mpe.app.data.prepare_log import prepare_log

WriteLog = Callable[..., Path]


def prepare_csv(path: Path, out: Path, **options: Any) -> PreparedDataset:
    """Prepare a CSV log with options of both :func:`csv_log` and :func:`prepare_log`."""
    own = {name: options.pop(name) for name in ("min_count", "split", "seed", "progress") if name in options}
    return prepare_log(csv_log(path, **options), out, **own)


@pytest.fixture
def write_csv(tmp_path: Path) -> WriteLog:
    """Writes a CSV file from a header and rows of cells."""

    def write(header: str, rows: Iterable[Iterable[object]], name: str = "log.csv") -> Path:
        path = tmp_path / name
        path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_criteo(tmp_path: Path) -> WriteLog:
    """Writes a log in Criteo's format from one dictionary {column: value} a row, where other cells are empty."""

    def write(rows: Iterable[dict[str, object]], name: str = "log.tsv") -> Path:
        columns = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
        path = tmp_path / name
        lines = ("\t".join(str(row.get(column, "")) for column in columns) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
