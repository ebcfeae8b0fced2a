"""Find the line of a log that is wrong: a slow second reading, done only after the fast one has failed."""

import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchrec_mpe.app.data.log import DELIMITERS, Log
from torchrec_mpe.app.data.log_files import compression, content, log_files, open_unpacked
from torchrec_mpe.app.data.parquet import open_parquet
from torchrec_mpe.errors import UserError

_LONGEST_CELL = (1 << 31) - 1  # what the fast reader can take at most; csv's own limit is 131,072


def _open(path: Path) -> Any:
    # Python's own gzip tells a file that ends too early from a damaged one.
    return gzip.open(path, "rb") if compression(path) == "gzip" else open_unpacked(path)


def _records(log: Log, path: Path, *, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield (1-based line number, cells) of every line that is not empty; bytes that are not UTF-8 become surrogates.

    ``strict`` refuses double quotes that are out of place.

    Raises:
        UserError: where the text cannot be read on, with the line number.
    """
    with _open(path) as opened:
        raw = opened[0] if isinstance(opened, tuple) else opened
        text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
        if log.quoted:
            reader = csv.reader(text, delimiter=log.delimiter, strict=strict)
        else:
            reader = csv.reader(text, delimiter=log.delimiter, quoting=csv.QUOTE_NONE)
        while True:
            line = reader.line_num + 1
            limit = csv.field_size_limit(_LONGEST_CELL)
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(
                    f"{path}, line {line}: cannot be read ({error}): mend it, above all its double quotes"
                ) from None
            except (EOFError, OSError, zlib.error) as error:
                early = isinstance(error, EOFError) or "runcated" in str(error)
                what = "ends here too early" if early else "is damaged here"
                raise UserError(f"{path}, line {line}: the {compression(path)} file {what}: copy it again") from None
            finally:
                csv.field_size_limit(limit)
            if cells:
                yield line, cells


def first_lines(log: Log, path: Path, count: int) -> list[tuple[int, list[str]]]:
    """Line numbers and cells of the first ``count`` lines that are not empty, or of fewer where there are no more.

    Raises:
        UserError: if they cannot be read.
    """
    return list(itertools.islice(_records(log, path), count))


def place_of_row(log: Log, row: int) -> str:
    """The file and the 1-based line (of Parquet: row) of the data row with 0-based index ``row``."""
    for path in log_files(log.paths):
        if content(path) == "parquet":
            with open_parquet(path) as file:
                rows = file.metadata.num_rows
            if row < rows:
                return f"{path}, row {row + 1}"
            row -= rows
            continue
        rows = 0
        for line, _ in itertools.islice(_records(log, path), int(log.header is None), None):
            if rows == row:
                return f"{path}, line {line}"
            rows += 1
        row -= rows
    raise IndexError(f"{log.name} has too few rows")


def unreadable(log: Log, path: Path, reason: Exception, longest: int) -> UserError:
    """The error to show for a file that the fast reader gave up on because of ``reason``, with its line number.

    ``longest`` is the number of bytes of a line that it can take.
    """
    try:
        for strict in (False, True):
            names = log.header
            for line, cells in _records(log, path, strict=strict):
                if names is None:
                    names = tuple(cells)
                else:
                    check_cells(log, path, line, names, cells)
                size = sum(map(len, cells))
                if size > longest:
                    raise UserError(
                        f"{path}, line {line}: the line has {size:,} characters, and {longest:,} can be read: mend it, "
                        "above all its double quotes"
                    )
    except UserError as error:
        return error
    return UserError(f"{path} cannot be read ({str(reason).splitlines()[0][:200]!r}): mend the file")


def check_cells(log: Log, path: Path, line: int, names: tuple[str, ...], cells: list[str]) -> None:
    """Raise a UserError unless there is a cell for each name and the used ones are UTF-8."""
    if len(cells) != len(names):
        raise UserError(
            f"{path}, line {line}: {len(cells)} columns found where {len(names)}{log.layout} are expected: "
            f"{_advice(log, cells)}"
        )
    for name, cell in zip(names, cells, strict=True):
        if name in log.used_columns and any("\udc80" <= character <= "\udcff" for character in cell):
            raise UserError(f"{path}, line {line}, column {name!r}: the text is not UTF-8: convert the file to UTF-8")


def _advice(log: Log, cells: list[str]) -> str:
    if log.format == "criteo" and len(cells) == 39:
        return "Criteo's test files have no labels and cannot be trained on: give train.txt"
    if other := other_delimiter(log, cells):
        option = "--format csv with --delimiter" if log.format == "criteo" else "--delimiter"
        return f"the file seems to have another delimiter: use {option} {other}"
    return "mend or remove the line"


def other_delimiter(log: Log, cells: list[str]) -> str | None:
    """The name of the delimiter that a line seems to have, where it was not cut by the log's."""
    counts = {name: cells[0].count(sign) for sign, name in DELIMITERS.items() if sign not in (log.delimiter, " ")}
    most = max(counts, key=lambda name: counts[name])
    return most if len(cells) == 1 and counts[most] else None
