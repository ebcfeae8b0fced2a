"""What a click or rating log holds: which file, which columns, and what each column means."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from torchrec_mpe.app.data.label import LabelRule
from torchrec_mpe.errors import UserError

CRITEO_NUMBERS = tuple(f"I{i}" for i in range(1, 14))
CRITEO_CATEGORIES = tuple(f"C{i}" for i in range(1, 27))


@dataclass(frozen=True)
class Column:
    """One feature column of a log.

    ``kind`` is "category" (the text is the id), "bag" (ids joined by ``separator``) or "number" (bucketized into
    categories, and also kept as a dense feature).
    """

    name: str
    kind: Literal["category", "bag", "number"]
    separator: str | None = None


@dataclass(frozen=True)
class Log:
    """A text log, plain or gzip, and how to read it.

    ``header`` holds the names of all columns when the file has no header line, and is None when it has one.
    ``quoted`` says whether double quotes protect delimiters and line ends, as in CSV. ``layout`` tells a user of a file
    without a header line in brackets what the columns are.
    """

    path: Path
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
    def used_columns(self) -> tuple[str, ...]:
        """Names of the columns to read, label first, each once."""
        time = () if self.time is None else (self.time,)
        return tuple(dict.fromkeys((self.label, *(column.name for column in self.columns), *time)))

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the number columns, in order."""
        return tuple(column.name for column in self.columns if column.kind == "number")


def criteo_log(path: str | os.PathLike[str]) -> Log:
    """Criteo's format: label, 13 numbers I1..I13, 26 categories C1..C26, tab-separated, plain or gzip, no header.

    An empty cell is missing, which is a value of its own.
    """
    numbers = tuple(Column(name, "number") for name in CRITEO_NUMBERS)
    categories = tuple(Column(name, "category") for name in CRITEO_CATEGORIES)
    return Log(
        path=Path(path),
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
    path: str | os.PathLike[str],
    *,
    label: str,
    fields: Sequence[str],
    positive: str | None = None,
    numbers: Sequence[str] = (),
    separators: Mapping[str, str] | str = MappingProxyType({}),
    time: str | None = None,
) -> Log:
    """A CSV file with a header line; ``fields`` come first in the order of columns, then ``numbers``.

    Args:
        path (PathLike): the log, plain or gzip, UTF-8, comma-separated.
        label (str): the label's column.
        fields (Sequence[str]): the columns of ids.
        positive (Optional[str]): which labels are positive, such as ">=5", "==1" or "4" (the same as "==4"); None if
            they are 0 and 1.
        numbers (Sequence[str]): the columns of numbers.
        separators (Union[Mapping[str, str], str]): for fields with several values in a cell, the text between the
            values; one text is for all ``fields``. An empty cell is an empty bag there, while in the other fields it is
            a value of its own.
        time (Optional[str]): for a chronological split, a column of numbers or ISO dates that orders the rows; None for
            file order.

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
    columns = [
        Column(name, "bag", separators[name]) if name in separators else Column(name, "category") for name in fields
    ]
    columns += [Column(name, "number") for name in numbers]
    return Log(
        path=Path(path),
        format="csv",
        label=label,
        rule=LabelRule.parse(positive),
        columns=tuple(columns),
        time=time,
        header=None,
        delimiter=",",
        quoted=True,
    )
