"""The command line of a job's ranks."""

import argparse
from pathlib import Path

from torchrec_mpe.app.data.formats import add_data_options, log_description, prepared_folder
from torchrec_mpe.app.launch.job import JobSettings
from torchrec_mpe.app.training.options import RUN_SETTINGS, SETTINGS, add_options, settings_of


def parser() -> argparse.ArgumentParser:
    """Commands search, retrain, emit and pipeline."""
    top = argparse.ArgumentParser(
        prog="python -m torchrec_mpe.app.launch.trainer",
        description="One rank of a job of any number; torchrun or torchx starts them. A job that was cut off goes on "
        "from its last checkpoint when it is started again with the same --out.",
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    search = commands.add_parser("search", help="prepare a log, search bit-widths, sample them into plan.json")
    add_data_options(search, prepared=True)
    add_options(search.add_argument_group("training"), SETTINGS, without=["resets"])
    search.add_argument("--out", type=Path, required=True, help="folder of the search")

    retrain = commands.add_parser("retrain", help="retrain at the bit-widths that a search sampled")
    retrain.add_argument("--search", type=Path, required=True, help="folder of a finished search")
    retrain.add_argument("--out", type=Path, required=True, help="folder of the retraining")
    training = retrain.add_argument_group("training")
    add_options(training, ["epochs", "batch_size", "seed"], inherited_from="the search's")
    add_options(training, ["resets"])

    emit = commands.add_parser("emit", help="pack a retrained model and evaluate it on the test rows")
    emit.add_argument("--retrained", type=Path, required=True, help="folder of a finished retraining")
    emit.add_argument("--out", type=Path, required=True, help="folder of the packed model")

    pipeline = commands.add_parser("pipeline", help="search, retrain and emit into --out/search, retrain and artifact")
    add_data_options(pipeline, prepared=True)
    add_options(pipeline.add_argument_group("training"), SETTINGS)
    pipeline.add_argument("--out", type=Path, required=True, help="folder of the three stages' folders")

    for command in (search, retrain, emit, pipeline):
        running = command.add_argument_group("running")
        add_options(running, RUN_SETTINGS)
        running.add_argument(
            "--log-every", type=int, default=100, help="steps between writes of steps.jsonl (default: 100)"
        )
    return top


def search_settings(options: argparse.Namespace, out: Path) -> JobSettings:
    """The settings of a search into ``out``."""
    return JobSettings(
        **vars(settings_of(options, resets=0)),
        stage="search",
        log=log_description(options),
        data=str(prepared_folder(options, out / "data").resolve()),
        search=None,
    )
