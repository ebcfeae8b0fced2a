"""`torchrec-mpe prepare`: only the data step."""

import argparse
from pathlib import Path

from torchrec_mpe.app.cli.output import check_output
from torchrec_mpe.app.data.formats import add_data_options, prepare_data, print_notes
from torchrec_mpe.app.data.split import SPLITS


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser("prepare", help="turn a click log into prepared data, memory-mapped by later runs")
    add_data_options(parser, prepared=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the prepared data; must not exist")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prepare a log and say what came out."""
    check_output(options)
    data = prepare_data(options, options.out, progress=not options.quiet)
    print_notes(data)
    rows = {split: data.num_rows(split) for split in SPLITS}
    print(f"{options.out}: " + ", ".join(f"{n:,} {split} rows" for split, n in rows.items()))
    for field in data.fields:
        print(f"  {field.name}: {field.num_embeddings:,} ids{', several a row' if field.multi_valued else ''}")
    return 0
