"""The formats of data that the command line reads: a table, of which each entry has its options, checks and reader."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.data.log import Log, criteo_log, csv_log
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
    )


FORMATS = {
    "criteo": Format(lambda options: criteo_log(options.data)),
    "csv": Format(
        _read_csv,
        {
            "label": {"help": "the label's column"},
            "positive": {"help": "which labels are positive, such as '>=5'; by default labels are 0 and 1"},
            "fields": {"type": _names, "default": [], "help": "columns of ids, separated by commas"},
            "numbers": {"type": _names, "default": [], "help": "columns of numbers, separated by commas"},
            "separator": {"help": "text between the ids of a cell with several, such as '|'"},
            "time": {"help": "the column that orders rows for --split chronological; else file order"},
        },
    ),
    "prepared": Format(None),
}

_COMMON: Mapping[str, Mapping[str, Any]] = {
    "split": {"choices": get_args(SplitKind), "default": "random", "help": "8:1:1 (default: random)"},
    "split-seed": {"type": int, "default": 0, "help": "of the random split (default: 0)"},
    "min-count": {
        "type": int,
        "default": 2,
        "help": "rarer values share one id a field (default: 2, in training rows)",
    },
}


def add_data_options(parser: argparse.ArgumentParser, *, prepared: bool) -> None:
    """Add the options that describe a log; with ``prepared`` also a prepared folder is a format."""
    group = parser.add_argument_group("data")
    formats = [name for name, kind in FORMATS.items() if prepared or kind.read is not None]
    group.add_argument("--format", choices=formats, required=True, help="what --data is")
    group.add_argument("--data", type=Path, required=True, help="the log, plain or gzip; or a prepared folder")
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
    names = ["format", *own, *(option.replace("-", "_") for option in _COMMON)]
    return {"log": str(options.data.resolve()), **{name: getattr(options, name) for name in names}}


def prepared_folder(options: argparse.Namespace, out: Path) -> Path:
    """Where the prepared data is or will be: ``out`` unless it is prepared already."""
    folder: Path = out if FORMATS[options.format].read is not None else options.data
    return folder


def prepare_data(options: argparse.Namespace, out: Path, *, progress: bool) -> PreparedDataset:
    """Prepare the log into ``out``, or open it where it is already prepared.

    Raises:
        UserError: for a mistake in the log or in the options.
    """
    kind = FORMATS[options.format]
    if kind.read is None:
        return PreparedDataset.open(options.data)
    others = [option for other in FORMATS.values() if other is not kind for option in other.options]
    if given := [f"--{option}" for option in others if getattr(options, option)]:
        raise UserError(f"{', '.join(given)} cannot be used with --format {options.format}")
    return prepare_log(
        kind.read(options),
        out,
        min_count=options.min_count,
        split=options.split,
        seed=options.split_seed,
        progress=progress,
    )


def print_notes(data: PreparedDataset) -> None:
    """Say which columns the preparation left out: one line each, or one for many."""
    notes = data.notes
    for note in notes if len(notes) <= 5 else [f"{len(notes)} columns are left out; see manifest.json in {data.path}"]:
        print(f"note: {note}")
