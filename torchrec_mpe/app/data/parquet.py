"""Columns of Parquet files as the text that a log's other formats have; lists stay lists."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet

from torchrec_mpe.app.data.log import Log
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.progress import progress_bar

_BATCH_ROWS = 1 << 16


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile.

    Raises:
        UserError: if it is damaged.
    """
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is a damaged Parquet file: copy it again") from error


def column_types(path: Path) -> dict[str, Any]:
    """pyarrow's type of each column."""
    with open_parquet(path) as file:
        return {field.name: field.type for field in file.schema_arrow}


def is_list(kind: Any) -> bool:
    """Whether cells of a type hold any number of values."""
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def check_types(log: Log, path: Path) -> None:
    """Raise a UserError unless each used column can be what the log uses it as."""
    types = column_types(path)
    bags = {column.name for column in log.columns if column.kind == "bag"}
    for name in log.used_columns:
        kind = types[name]
        if is_list(kind) and (name not in bags or not _plain(kind.value_type)):
            raise UserError(f"{path}: column {name!r} holds lists ({kind}): only fields can, of texts or whole numbers")
        if not is_list(kind) and pa.types.is_nested(kind):
            raise UserError(f"{path}: column {name!r} is of type {kind}: give each of its parts a column of its own")


def _plain(kind: Any) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))


def read_parquet(log: Log, path: Path, *, progress: bool) -> Iterator[pl.DataFrame]:
    """Frames of the used columns: String, or List(String), without nulls.

    Times become microseconds since 1970, and a label of true and false becomes 1 and 0.

    Raises:
        UserError: if the file is damaged.
    """
    names = list(log.used_columns)
    with (
        open_parquet(path) as file,
        progress_bar(
            total=file.metadata.num_rows, unit="row", unit_scale=True, desc=f"reading {path.name}", disable=not progress
        ) as bar,
    ):
        batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=names)
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                frame = pl.from_arrow(pa.Table.from_batches([batch]).select(names))
                assert isinstance(frame, pl.DataFrame)
                texts = frame.select(_text(log, column) for column in frame)
            except (pa.ArrowException, pl.exceptions.PolarsError, OSError) as error:
                raise UserError(
                    f"{path} cannot be read ({str(error).splitlines()[0][:200]}): write it again"
                ) from error
            bar.update(texts.height)
            yield texts


def _text(log: Log, column: pl.Series) -> pl.Series:
    kind = column.dtype
    if isinstance(kind, pl.Array):
        column = column.arr.to_list()
    if isinstance(kind, pl.List | pl.Array):
        lists: pl.Series = column.cast(pl.List(pl.String)).fill_null([])
        return lists
    if kind.is_float():
        column = column.fill_nan(None)
    elif kind == pl.Boolean and column.name == log.label:
        column = column.cast(pl.Int8)
    elif kind.is_temporal() and column.name == log.time:
        column = column.cast(pl.Datetime("us")).dt.epoch("us")
    text: pl.Series = column.cast(pl.String).fill_null("")
    return text
