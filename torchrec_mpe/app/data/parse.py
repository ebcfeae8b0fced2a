"""Turn a batch of text into labels, times, dense features and category texts."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from torchrec_mpe.app.data.bags import bag_lists, looks_unread
from torchrec_mpe.app.data.bucketing import bucket_text, dense_feature
from torchrec_mpe.app.data.diagnosis import place_of_row
from torchrec_mpe.app.data.log import Log
from torchrec_mpe.errors import UserError


@dataclass(frozen=True)
class ParsedBatch:
    """n rows of a log.

    ``labels`` is bool [n]; ``times`` is float64 [n] or None; ``dense`` is float32 [n, number columns];
    ``categories`` has one column per feature column: String, or List(String) for bags.
    """

    labels: npt.NDArray[np.bool_]
    times: npt.NDArray[np.float64] | None
    dense: npt.NDArray[np.float32]
    categories: pl.DataFrame


def _reject(log: Log, text: pl.Series, good: pl.Series, first_row: int, what: str) -> None:
    """Raise the error for the first row where ``good`` is false."""
    if good.all():
        return
    row = int(good.to_numpy().argmin())
    raise UserError(f"{place_of_row(log, first_row + row)}, column {text.name!r}: {_shown(text[row])} {what}")


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}..."


def _numbers(frame: pl.DataFrame, names: tuple[str, ...]) -> pl.DataFrame:
    """Float64 columns; null where the text is empty or not a number."""
    return frame.select(pl.col(names).str.strip_chars().cast(pl.Float64, strict=False))


def _times(log: Log, text: pl.Series, first_row: int) -> npt.NDArray[np.float64]:
    """Float64 [n]: numbers as they are, dates and times of ISO 8601 in microseconds since 1970."""
    times = text.str.strip_chars().cast(pl.Float64, strict=False)
    if times.null_count():
        # Other orders of day, month and year would be guessed at.
        iso = text.str.strip_chars().str.contains(r"^\d{4}-\d{2}-\d{2}")
        dates = text.str.strip_chars().str.to_datetime(strict=False, time_unit="us", time_zone="UTC")
        times = dates.zip_with(iso, dates.clear(dates.len())).cast(pl.Int64).cast(pl.Float64)
    good = times.is_finite().fill_null(False)
    _reject(log, text, good, first_row, "is not a time: write numbers in all rows, or ISO dates in all rows")
    result: npt.NDArray[np.float64] = times.to_numpy()
    return result


def parse_batch(log: Log, frame: pl.DataFrame, first_row: int) -> ParsedBatch:
    """Parse the text columns of ``frame``, whose first row is the log's data row ``first_row`` (0-based).

    Raises:
        UserError: if a label, number or time is not one, with its line number, column and value.
    """
    text = frame[log.label]
    values = text.str.strip_chars() if log.rule.texts else _numbers(frame, (log.label,)).to_series()
    if log.rule.texts:
        wanted, advice = "is empty", "mend the line"
    elif log.rule.comparison:
        wanted, advice = "is not a number", "mend the line, or name the positive labels"
    else:
        wanted, advice = "is not 0 or 1", "mend the line, or say which labels are positive, such as --positive True"
    _reject(log, text, log.rule.valid(values), first_row, f"{wanted}, so it is no label: {advice}")
    labels = log.rule.positive(values).to_numpy()

    times = None if log.time is None else _times(log, frame[log.time], first_row)

    numbers = _numbers(frame, log.numbers) if log.numbers else pl.DataFrame()
    for column in numbers:
        good = column.is_finite().fill_null(False)
        if not good.all():
            text = frame[column.name]
            good |= text.str.strip_chars() == ""
            _reject(log, text, good, first_row, "is not a number: mend the line, or make the column a field")
    if log.numbers:
        dense = numbers.select(dense_feature(pl.all())).to_numpy()
    else:
        dense = np.zeros((frame.height, 0), np.float32)

    categories = frame.select(
        _bags(log, frame[column.name], column.separator, first_row) if column.kind == "bag" else frame[column.name]
        for column in log.columns
    ).with_columns(bucket_text(column) for column in numbers)
    if first_row == 0:
        _check_ids(log, categories)
    return ParsedBatch(labels, times, np.ascontiguousarray(dense), categories)


def _bags(log: Log, cells: pl.Series, separator: str | None, first_row: int) -> pl.Series:
    return bag_lists(cells, separator, lambda good, what: _reject(log, cells, good, first_row, what))


def _check_ids(log: Log, categories: pl.DataFrame) -> None:
    """Raise a UserError if the first rows hold what would be taken for single ids, and is more."""
    for column in log.columns:
        is_bag = column.kind == "bag"
        cells = categories[column.name].explode() if is_bag else categories[column.name]
        if column.kind != "number" and (reason := looks_unread(cells.drop_nulls(), is_bag)):
            shown = next(cell for cell in cells if cell)
            raise UserError(f"{log.name}: column {column.name!r}, such as {_shown(shown)}, {reason}")
