"""Find the line of a log that is wrong: a slow second reading, done only after the fast one has failed."""

import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

from torchrec_mpe.app.data.log import Log
from torchrec_mpe.errors import UserError


def is_gzip(path: Path) -> bool:
    """Whether the file starts as gzip does, whatever its name."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _records(log: Log, *, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield (1-based line number, cells) of every line that is not empty; bytes that are not UTF-8 become surrogates.

    ``strict`` refuses double quotes that are out of place.

    Raises:
        UserError: where the text cannot be read on, with the line number.
    """
    opener = gzip.open if is_gzip(log.path) else open
    with (
        opener(log.path, "rb") as raw,
        io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        if log.quoted:
            reader = csv.reader(text, delimiter=log.delimiter, strict=strict)
        else:
            reader = csv.reader(text, delimiter=log.delimiter, quoting=csv.QUOTE_NONE)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except EOFError:
                raise UserError(f"{log.path}, line {line}: the gzip file ends here too early: copy it again") from None
            except (gzip.BadGzipFile, zlib.error):
                raise UserError(f"{log.path}, line {line}: the gzip file is damaged here: copy it again") from None
            except csv.Error as error:
                raise UserError(
                    f"{log.path}, line {line}: cannot be read ({error}): mend it, above all its double quotes"
                ) from None
            if cells:
                yield line, cells


def first_lines(log: Log, count: int) -> list[list[str]]:
    """Cells of the first ``count`` lines that are not empty, or of fewer where there are no more.

    Raises:
        UserError: if they cannot be read.
    """
    return [cells for _, cells in itertools.islice(_records(log), count)]


def line_of_row(log: Log, row: int) -> int:
    """1-based line number where the data row with 0-based index ``row`` starts."""
    wanted = row if log.header is not None else row + 1
    for index, (line, _) in enumerate(_records(log)):
        if index == wanted:
            return line
    raise IndexError(f"{log.path} has no row {row}")


def unreadable(log: Log, reason: Exception) -> UserError:
    """The error to show for a log that the fast reader gave up on because of ``reason``, with its line number."""
    try:
        for strict in (False, True):
            names = log.header
            for line, cells in _records(log, strict=strict):
                if names is None:
                    names = tuple(cells)
                else:
                    _check_cells(log, line, names, cells)
    except UserError as error:
        return error
    return UserError(f"{log.path} cannot be read ({reason}): mend the file")


def _check_cells(log: Log, line: int, names: tuple[str, ...], cells: list[str]) -> None:
    """Raise a UserError unless there is a cell for each name and the used ones are UTF-8."""
    if len(cells) != len(names):
        raise UserError(
            f"{log.path}, line {line}: {len(cells)} columns found where {len(names)}{log.layout} are expected: "
            "mend or remove the line"
        )
    for name, cell in zip(names, cells, strict=True):
        if name in log.used_columns and any("\udc80" <= character <= "\udcff" for character in cell):
            raise UserError(
                f"{log.path}, line {line}, column {name!r}: the text is not UTF-8: convert the file to UTF-8"
            )
