"""The options that say which log to read, and how."""

import argparse
from pathlib import Path

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.data.prepare_log import prepare_criteo, prepare_csv
from torchrec_mpe.errors import UserError


def add_data_options(parser: argparse.ArgumentParser, *, prepared: bool) -> None:
    """Add the options that describe a log; with ``prepared`` also a prepared folder is a format."""
    formats = ["criteo", "csv", *(["prepared"] if prepared else [])]
    group = parser.add_argument_group("data")
    group.add_argument("--format", choices=formats, required=True, help="what --data is")
    group.add_argument("--data", type=Path, required=True, help="the log, plain or gzip; or a prepared folder")
    group.add_argument("--label", help="csv: the label's column")
    group.add_argument(
        "--positive", help="csv: which labels are positive, such as '>=5'; by default labels are 0 and 1"
    )
    group.add_argument("--fields", type=_names, default=[], help="csv: columns of ids, separated by commas")
    group.add_argument("--numbers", type=_names, default=[], help="csv: columns of numbers, separated by commas")
    group.add_argument("--separator", help="csv: text between the ids of a cell with several, such as '|'")
    group.add_argument("--time", help="csv: the column that orders rows for --split chronological; else file order")
    group.add_argument("--split", choices=["random", "chronological"], default="random", help="8:1:1 (default: random)")
    group.add_argument("--split-seed", type=int, default=0, help="of the random split (default: 0)")
    group.add_argument(
        "--min-count", type=int, default=2, help="rarer values share one id a field (default: 2, in training rows)"
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty column name")
    return names


def prepare_data(options: argparse.Namespace, out: Path, *, progress: bool) -> PreparedDataset:
    """Prepare the log into ``out``, or open it where it is already prepared.

    Raises:
        UserError: for a mistake in the log or in the options.
    """
    if options.format == "prepared":
        return PreparedDataset.open(options.data)
    common = {
        "min_count": options.min_count,
        "split": options.split,
        "seed": options.split_seed,
        "progress": progress,
    }
    if options.format == "criteo":
        given = [
            f"--{o}" for o in ("label", "positive", "fields", "numbers", "separator", "time") if getattr(options, o)
        ]
        if given:
            raise UserError(f"{', '.join(given)} cannot be used with --format criteo: its columns are fixed")
        data = prepare_criteo(options.data, out, **common)
    else:
        if options.label is None:
            raise UserError("--format csv needs --label, the column of the label")
        if not options.fields and not options.numbers:
            raise UserError("--format csv needs --fields, the columns of ids")
        data = prepare_csv(
            options.data,
            out,
            label=options.label,
            fields=options.fields,
            positive=options.positive,
            numbers=options.numbers,
            separators=options.separator or {},
            time=options.time,
            **common,
        )
    for split in ("train", "validation", "test"):
        if data.num_rows(split) == 0:
            raise UserError(f"{options.data} has too few rows: none came into the {split} part of the 8:1:1 split")
    return data


def print_notes(data: PreparedDataset) -> None:
    """Say which columns the preparation left out: one line each, or one for many."""
    notes = data.notes
    for note in notes if len(notes) <= 5 else [f"{len(notes)} columns are left out; see manifest.json in {data.path}"]:
        print(f"note: {note}")
