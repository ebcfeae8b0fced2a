"""Stream a log's rows as batches of text columns, in bounded memory."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.csv

from torchrec_mpe.app.data.diagnosis import check_cells, first_lines, other_delimiter, unreadable
from torchrec_mpe.app.data.log import Log
from torchrec_mpe.app.data.log_files import content, log_files, open_unpacked
from torchrec_mpe.app.data.parquet import check_types, column_types, is_list, read_parquet
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.progress import progress_bar

BLOCK_BYTES = 8 << 20
"""Text parsed at a time."""
_SHOWN_NAMES, _SHOWN_LENGTH = 20, 40


def checked_log(log: Log) -> Log:
    """The log, its fields being bags where its Parquet files hold lists.

    Raises:
        UserError: if a file is missing, empty or of a format that is not read, or a column is missing.
    """
    files = log_files(log.paths)
    kinds = {path: content(path) for path in files}
    parquet = [path for path in files if kinds[path] == "parquet"]
    if parquet and log.format == "criteo":
        raise UserError(f"{parquet[0]} is a Parquet file, and Criteo's format is text: use --format csv")
    if parquet:
        types = column_types(parquet[0])
        lists = {name for name, kind in types.items() if is_list(kind)}
        log = replace(
            log,
            columns=tuple(
                replace(column, kind="bag") if column.kind == "category" and column.name in lists else column
                for column in log.columns
            ),
        )
        if len(parquet) < len(files) and any(
            column.separator is None and column.kind == "bag" for column in log.columns
        ):
            raise UserError(f"{log.name}: Parquet files with lists cannot be read together with text: give one kind")
    for path in files:
        if kinds[path] == "text":
            _check_text(log, path)
            continue
        with_columns = column_types(path)
        _check_names(log, path, list(with_columns), "")
        check_types(log, path)
    return log


def _check_text(log: Log, path: Path) -> None:
    lines = first_lines(log, path, 2)
    if not lines:
        raise UserError(f"{path} is empty: give a log with at least one row")
    line, names = lines[0]
    if log.header is None:
        other = other_delimiter(log, names)
        numbers = any(name.strip().lstrip("-").replace(".", "").isdecimal() for name in names)
        advice = f": the delimiter seems to be another, give --delimiter {other}" if other else ""
        if numbers and not other:
            advice = ": if the first line is a row already, name all columns with --columns"
        _check_names(log, path, names, advice)
        if len(lines) == 1:
            raise UserError(f"{path} has a header line but no rows: give a log with at least one row")
    else:
        check_cells(log, path, line, log.header, names)
        place = log.header.index(log.label)
        if names[place].strip().casefold() == log.label.casefold():
            advice = "--format csv with --delimiter tab" if log.format == "criteo" else "no --columns"
            raise UserError(f"{path}, line {line}: this is a header line, which is not expected: use {advice}")


def _check_names(log: Log, path: Path, names: list[str], advice: str) -> None:
    for name in log.used_columns:
        if name not in names:
            shown = [repr(other if len(other) <= _SHOWN_LENGTH else other[:_SHOWN_LENGTH] + "...") for other in names]
            more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
            columns = ", ".join(shown[:_SHOWN_NAMES]) + more
            raise UserError(f"{path} has no column {name!r}: its columns are {columns}{advice}")
        if names.count(name) > 1:
            raise UserError(f"{path}: column {name!r} appears more than once: rename all but one")


def read_text(log: Log, *, progress: bool) -> Iterator[pl.DataFrame]:
    """Yield the used columns of the log as text, in the order of files; a missing value is the empty text.

    Each frame has ``log.used_columns`` as String columns without nulls, lists of Parquet files as List(String), and
    holds about ``BLOCK_BYTES`` of a file.

    Raises:
        UserError: if a file is missing, empty or unreadable, or a column is missing; with the line number where
            there is one.
    """
    log = checked_log(log)
    for path in log_files(log.paths):
        if content(path) == "parquet":
            yield from read_parquet(log, path, progress=progress)
        else:
            yield from _read_csv(log, path, progress)


def _read_csv(log: Log, path: Path, progress: bool) -> Iterator[pl.DataFrame]:
    names = None if log.header is None else list(log.header)
    used = list(log.used_columns)
    size = path.stat().st_size
    with (
        open_unpacked(path) as (source, file),
        progress_bar(total=size, unit="B", unit_scale=True, desc=f"reading {path.name}", disable=not progress) as bar,
    ):
        try:
            reader = pyarrow.csv.open_csv(
                source,
                read_options=pyarrow.csv.ReadOptions(column_names=names, block_size=BLOCK_BYTES),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=log.delimiter,
                    quote_char='"' if log.quoted else False,
                    newlines_in_values=log.quoted,
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=used,
                    column_types=dict.fromkeys(used, pa.string()),
                    null_values=[],
                    strings_can_be_null=False,
                ),
            )
        except (pa.ArrowException, OSError) as error:
            raise unreadable(log, path, error, BLOCK_BYTES) from error
        with reader:
            while True:
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    break
                except (pa.ArrowException, OSError) as error:
                    raise unreadable(log, path, error, BLOCK_BYTES) from error
                bar.update(min(file.tell(), size) - bar.n)
                if batch.num_rows:
                    frame = pl.from_arrow(batch)
                    assert isinstance(frame, pl.DataFrame)
                    yield frame
        bar.update(size - bar.n)
