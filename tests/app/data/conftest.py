"""Small logs to prepare."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

WriteLog = Callable[..., Path]


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
