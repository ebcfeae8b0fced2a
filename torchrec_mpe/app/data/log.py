"""What a click or rating log holds: which files, which columns, and what each column means."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from torchrec_mpe.app.data.label import LabelRule
from torchrec_mpe.app.data.log_files import shown_paths
from torchrec_mpe.errors import UserError

CRITEO_NUMBERS = tuple(f"I{i}" for i in range(1, 14))
CRITEO_CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe", " ": "space"}
"""Delimiters by character, and what the command line calls them."""


@dataclass(frozen=True)
class Column:
    """One feature column of a log.

    ``kind`` is "category" (the text is the id), "bag" (ids joined by ``separator``; "json": a JSON list; None: lists of
    a Parquet file) or "number" (bucketized into categories, and also kept as a dense feature).
    """

    name: str
    kind: Literal["category", "bag", "number"]
    separator: str | None = None


@dataclass(frozen=True)
class Log:
    """A log and how to read it: text, plain or compressed, or Parquet, whose columns have their own names.

    ``paths`` are files, folders or patterns, in the order of rows: see :func:`~.log_files.log_files`.
    ``header`` holds the names of all columns when the file has no header line, and is None when it has one.
    ``quoted`` says whether double quotes protect delimiters and line ends, as in CSV. ``layout`` tells a user of a file
    without a header line in brackets what the columns are.
    """

    paths: tuple[Path, ...]
    format: str
    label: str
    rule: LabelRule
    columns: tuple[Column, ...]
    time: str | None
    header: tuple[str, ...] | None
    delimiter: str
    quoted: bool
    layout: str = ""

    @property
    def name(self) -> str:
        """The paths, for messages."""
        return shown_paths(self.paths)

    @property
    def used_columns(self) -> tuple[str, ...]:
        """Names of the columns to read, label first, each once."""
        time = () if self.time is None else (self.time,)
        return tuple(dict.fromkeys((self.label, *(column.name for column in self.columns), *time)))

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the number columns, in order."""
        return tuple(column.name for column in self.columns if column.kind == "number")


PathOrPaths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def _paths(given: PathOrPaths) -> tuple[Path, ...]:
    return (Path(given),) if isinstance(given, str | os.PathLike) else tuple(map(Path, given))


def criteo_log(path: PathOrPaths) -> Log:
    """Criteo's format: label, 13 numbers I1..I13, 26 categories C1..C26, tab-separated, perhaps compressed, no header.

    An empty cell is missing, which is a value of its own. Several files are read as one: see :class:`Log`.
    """
    numbers = tuple(Column(name, "number") for name in CRITEO_NUMBERS)
    categories = tuple(Column(name, "category") for name in CRITEO_CATEGORIES)
    return Log(
        paths=_paths(path),
        format="criteo",
        label="label",
        rule=LabelRule.parse(None),
        columns=numbers + categories,
        time=None,
        header=("label", *CRITEO_NUMBERS, *CRITEO_CATEGORIES),
        delimiter="\t",
        quoted=False,
        layout=" (label, 13 numbers, 26 categories)",
    )


def csv_log(
    path: PathOrPaths,
    *,
    label: str,
    fields: Sequence[str],
    positive: str | None = None,
    numbers: Sequence[str] = (),
    separators: Mapping[str, str] | str = MappingProxyType({}),
    time: str | None = None,
    delimiter: str = ",",
    columns: Sequence[str] | None = None,
) -> Log:
    """A CSV or Parquet file; ``fields`` come first in the order of columns, then ``numbers``.

    Args:
        path (PathLike): the log: UTF-8 text, plain or in gzip, zstd, bz2 or lz4, or Parquet; or several, folders and
            patterns too, which are read as one: see :class:`Log`.
        label (str): the label's column.
        fields (Sequence[str]): the columns of ids.
        positive (Optional[str]): which labels are positive, such as ">=5", "==1", "4" (the same as "==4"), "True" or
            "click,buy"; None if they are 0 and 1.
        numbers (Sequence[str]): the columns of numbers.
        separators (Union[Mapping[str, str], str]): for fields with several values in a cell, the text between the
            values, or "json" where they are JSON lists; one text is for all ``fields``. An empty cell is an empty bag
            there, while in the other fields it is a value of its own. Lists of a Parquet file need none.
        time (Optional[str]): for a chronological split, a column of numbers or ISO dates that orders the rows; None for
            file order.
        delimiter (str): between the cells of a text, one character.
        columns (Optional[Sequence[str]]): the names of all columns of a text without a header line.

    Raises:
        UserError: if the options contradict each other or ``positive`` is not an expression.
    """
    for option, names in (("fields", fields), ("numbers", numbers)):
        if isinstance(names, str):
            raise UserError(f"{option} is the text {names!r}: give a list of column names")
    if isinstance(separators, str):
        separators = dict.fromkeys(fields, separators)
    names = [*fields, *numbers]
    if not names:
        raise UserError("no columns to learn from are named: give fields, numbers or both")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"column {name!r} is named more than once among fields and numbers: name it once")
    if label in names:
        raise UserError(f"column {label!r} is the label and cannot be a field or number too: name it once")
    for name, separator in separators.items():
        if name not in fields:
            raise UserError(f"a separator is given for {name!r}, which is not among the fields: name it in fields too")
        if not separator:
            raise UserError(f"the separator of field {name!r} is empty: give at least one character")
    if len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise UserError(f"the delimiter {delimiter!r} cannot be: give one character, not a quote or a line end")
    if columns is not None:
        if twice := [name for name in columns if columns.count(name) > 1]:
            raise UserError(f"column {twice[0]!r} is named twice among all columns: give each a name of its own")
        if missing := [name for name in (label, *names, time) if name is not None and name not in columns]:
            raise UserError(f"column {missing[0]!r} is not among the columns that are named: {', '.join(columns)}")
    kinds = [
        Column(name, "bag", separators[name]) if name in separators else Column(name, "category") for name in fields
    ]
    kinds += [Column(name, "number") for name in numbers]
    return Log(
        paths=_paths(path),
        format="csv",
        label=label,
        rule=LabelRule.parse(positive),
        columns=tuple(kinds),
        time=time,
        header=None if columns is None else tuple(columns),
        delimiter=delimiter,
        quoted=True,
    )
