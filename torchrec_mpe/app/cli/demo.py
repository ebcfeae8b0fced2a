"""`torchrec-mpe demo`: the main job on a generated click log."""

import argparse
import tempfile
from pathlib import Path

from torchrec_mpe.app.cli.run import add_run_options, check, compare, no_empty_folder
from torchrec_mpe.app.data.log import criteo_log
from torchrec_mpe.app.data.prepare_log import prepare_log
from torchrec_mpe.app.data.synthetic import write_synthetic_log
from torchrec_mpe.app.training.stages import Job


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser("demo", help="run the whole job on a generated log, half of whose fields are useless")
    parser.add_argument("--rows", type=int, default=300_000, help="of the generated log (default: 300000)")
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Generate a log in Criteo's format, prepare it and compare methods on it."""
    options.method = options.method or ["fp32", "rule:100", "coded:100", "mpe"]
    methods, settings, how = check(options)
    with no_empty_folder(options.out), tempfile.TemporaryDirectory() as folder:
        options.data = [Path("generated log")]
        log = Path(folder) / "generated-log.tsv"
        write_synthetic_log(log, rows=options.rows, progress=not options.quiet)
        data = prepare_log(criteo_log(log), options.out / "data", min_count=1, progress=not options.quiet)
        return compare(options, [Job(method, data, settings, how) for method in methods])
