"""The formats of data that the command line reads: a table, of which each entry has its options, checks and reader."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.data.log import DELIMITERS, Log, criteo_log, csv_log
from torchrec_mpe.app.data.prepare_log import prepare_log
from torchrec_mpe.app.data.split import SplitKind
from torchrec_mpe.errors import UserError


@dataclass(frozen=True)
class Format:
    """A kind of data.

    Attributes:
        read (Optional[Callable]): describes the log that the options name, or raises UserError for a mistake in them;
            None if the data is prepared already.
        options (Mapping[str, Mapping[str, Any]]): those of this format alone by name, with argparse's keywords.
    """

    read: Callable[[argparse.Namespace], Log] | None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty column name")
    return names


def _delimiter(text: str) -> str:
    signs: dict[str, str] = {name: sign for sign, name in DELIMITERS.items()} | {"\\t": "\t"}
    return signs.get(text, text)


def _read_csv(options: argparse.Namespace) -> Log:
    if options.label is None:
        raise UserError("--format csv needs --label, the column of the label")
    if not options.fields and not options.numbers:
        raise UserError("--format csv needs --fields, the columns of ids")
    return csv_log(
        options.data,
        label=options.label,
        fields=options.fields,
        positive=options.positive,
        numbers=options.numbers,
        separators=options.separator or {},
        time=options.time,
        delimiter=options.delimiter or ",",
        columns=options.columns,
    )


FORMATS = {
    "criteo": Format(lambda options: criteo_log(options.data)),
    "csv": Format(
        _read_csv,
        {
            "label": {"help": "the label's column"},
            "positive": {"help": "positive labels, such as '>=5', True or click,buy; by default labels are 0 and 1"},
            "fields": {"type": _names, "default": [], "help": "columns of ids, separated by commas"},
            "numbers": {"type": _names, "default": [], "help": "columns of numbers, separated by commas"},
            "separator": {"help": "text between the ids of a cell with several, such as '|'; json: JSON lists"},
            "delimiter": {
                "type": _delimiter,
                "help": f"between cells: a character, {', '.join(DELIMITERS.values())} (default: comma)",
            },
            "columns": {
                "type": _names,
                "help": "names of all columns, by commas, where no line has them",
            },
            "time": {"help": "the column that orders rows for --split chronological; else file order"},
        },
    ),
    "prepared": Format(None),
}

_COMMON: Mapping[str, Mapping[str, Any]] = {
    "split": {"choices": get_args(SplitKind), "help": "8:1:1 (default: random)"},
    "split-seed": {"type": int, "help": "of the random split (default: 0)"},
    "min-count": {"type": int, "help": "rarer values share one id a field (default: 2, in training rows)"},
}
# Not argparse's defaults, so that what is given for data that is prepared already can be told and refused.
_DEFAULTS: Mapping[str, Any] = {"split": "random", "split_seed": 0, "min_count": 2}


def add_data_options(parser: argparse.ArgumentParser, *, prepared: bool) -> None:
    """Add the options that describe a log; with ``prepared`` also a prepared folder is a format."""
    group = parser.add_argument_group("data")
    formats = [name for name, kind in FORMATS.items() if prepared or kind.read is not None]
    group.add_argument("--format", choices=formats, required=True, help="what --data is")
    group.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        help="the log: files, folders or patterns, plain, compressed (gzip, zstd, bz2, lz4) or, as csv, Parquet; or a "
        "prepared folder",
    )
    for name, kind in FORMATS.items():
        for option, keywords in kind.options.items():
            group.add_argument(f"--{option}", **{**keywords, "help": f"{name}: {keywords['help']}"})
    for option, keywords in _COMMON.items():
        group.add_argument(f"--{option}", **keywords)


def log_description(options: argparse.Namespace) -> dict[str, Any]:
    """The log and how it is read, by the options' names; empty if the data is prepared already."""
    if FORMATS[options.format].read is None:
        return {}
    own = [option for kind in FORMATS.values() for option in kind.options]
    paths = [str(path.resolve()) for path in options.data]
    return {
        "log": paths[0] if len(paths) == 1 else paths,
        **{name: getattr(options, name) for name in ["format", *own]},
        **_common(options),
    }


def _common(options: argparse.Namespace) -> dict[str, Any]:
    """The options of all logs, those that are not given at their defaults."""
    given = {name: getattr(options, name) for name in _DEFAULTS}
    return {name: _DEFAULTS[name] if value is None else value for name, value in given.items()}


def prepared_folder(options: argparse.Namespace, out: Path) -> Path:
    """Where the prepared data is or will be: ``out`` unless it is prepared already."""
    return out if FORMATS[options.format].read is not None else _prepared(options)


def _prepared(options: argparse.Namespace) -> Path:
    if len(options.data) > 1:
        raise UserError("--format prepared takes one folder as --data: prepare several logs together")
    folder: Path = options.data[0]
    return folder


def check_data_options(options: argparse.Namespace) -> None:
    """See that the options are of the format.

    Raises:
        UserError: naming those that are not.
    """
    kind = FORMATS[options.format]
    others = [option for other in FORMATS.values() if other is not kind for option in other.options]
    given = [f"--{option}" for option in others if getattr(options, option)]
    if kind.read is None:
        given += [f"--{option}" for option in _COMMON if getattr(options, option.replace("-", "_")) is not None]
    if given:
        raise UserError(f"{', '.join(given)} cannot be used with --format {options.format}")


def open_prepared(options: argparse.Namespace) -> PreparedDataset | None:
    """What --data is if it is prepared already, else None.

    Raises:
        UserError: if it is damaged, or options are given that it cannot honour.
    """
    check_data_options(options)
    return None if FORMATS[options.format].read is not None else PreparedDataset.open(_prepared(options))


def prepare_data(options: argparse.Namespace, out: Path, *, progress: bool) -> PreparedDataset:
    """Prepare the log into ``out``, or open it where it is already prepared.

    Raises:
        UserError: for a mistake in the log or in the options.
    """
    prepared = open_prepared(options)
    if prepared is not None:
        return prepared
    common = _common(options)
    read = FORMATS[options.format].read
    assert read is not None
    return prepare_log(
        read(options),
        out,
        min_count=common["min_count"],
        split=common["split"],
        seed=common["split_seed"],
        progress=progress,
    )


def print_notes(data: PreparedDataset) -> None:
    """Say which columns the preparation left out: one line each, or one for many."""
    notes = data.notes
    for note in notes if len(notes) <= 5 else [f"{len(notes)} columns are left out; see manifest.json in {data.path}"]:
        print(f"note: {note}")
