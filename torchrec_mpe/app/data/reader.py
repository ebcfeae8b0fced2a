"""Stream a log's rows as batches of text columns, in bounded memory."""

from collections.abc import Iterator

import polars as pl
import pyarrow as pa
import pyarrow.csv
from tqdm import tqdm

from torchrec_mpe.app.data.diagnosis import first_lines, is_gzip, unreadable
from torchrec_mpe.app.data.log import Log
from torchrec_mpe.errors import UserError

BLOCK_BYTES = 8 << 20
"""Text parsed at a time."""


def _check_file(log: Log) -> None:
    if not log.path.exists():
        raise UserError(f"{log.path} does not exist: give the path of a log")
    if log.path.is_dir():
        raise UserError(f"{log.path} is a folder: give the path of a log file")
    if log.path.stat().st_size == 0:
        raise UserError(f"{log.path} is empty: give a log with at least one row")


def _check_columns(log: Log) -> None:
    lines = first_lines(log, 2)
    if not lines:
        raise UserError(f"{log.path} is empty: give a log with at least one row")
    if log.header is not None:
        return
    names = lines[0]
    for name in log.used_columns:
        if name not in names:
            raise UserError(f"{log.path} has no column {name!r}: its columns are {', '.join(map(repr, names))}")
        if names.count(name) > 1:
            raise UserError(f"{log.path}: column {name!r} appears more than once: rename all but one")
    if len(lines) == 1:
        raise UserError(f"{log.path} has a header line but no rows: give a log with at least one row")


def read_text(log: Log, *, progress: bool) -> Iterator[pl.DataFrame]:
    """Yield the used columns of the log as text, in file order; a missing value is the empty text.

    Each frame has ``log.used_columns`` as String columns without nulls and holds about ``BLOCK_BYTES`` of the file.

    Raises:
        UserError: if the file is missing, empty or unreadable, or a column is missing; with the line number where
            there is one.
    """
    _check_file(log)
    _check_columns(log)
    names = None if log.header is None else list(log.header)
    used = list(log.used_columns)
    size = log.path.stat().st_size
    with (
        pa.OSFile(str(log.path), "rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"reading {log.path.name}", disable=not progress) as bar,
    ):
        source = pa.CompressedInputStream(file, "gzip") if is_gzip(log.path) else file
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
            raise unreadable(log, error) from error
        with reader:
            while True:
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    break
                except (pa.ArrowException, OSError) as error:
                    raise unreadable(log, error) from error
                bar.update(min(file.tell(), size) - bar.n)
                if batch.num_rows:
                    frame = pl.from_arrow(batch)
                    assert isinstance(frame, pl.DataFrame)
                    yield frame
        bar.update(size - bar.n)
