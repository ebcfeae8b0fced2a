"""The command line of a job's ranks."""

import argparse
from pathlib import Path

from torchrec.distributed.types import ShardingType

from torchrec_mpe.app.data.data_options import add_data_options
from torchrec_mpe.app.launch.job import JobSettings
from torchrec_mpe.app.training.loop import SHARDING_TYPES
from torchrec_mpe.errors import UserError
from torchrec_mpe.modules.search_config import SearchConfig

_DATA_OPTIONS = (
    "format", "label", "positive", "fields", "numbers", "separator", "time", "split", "split_seed", "min_count"
)  # fmt: skip


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
    _add_search_options(search)
    search.add_argument("--out", type=Path, required=True, help="folder of the search")

    retrain = commands.add_parser("retrain", help="retrain at the bit-widths that a search sampled")
    retrain.add_argument("--search", type=Path, required=True, help="folder of a finished search")
    retrain.add_argument("--out", type=Path, required=True, help="folder of the retraining")
    same = "(default: the search's)"
    retrain.add_argument("--epochs", type=int, help=f"passes over the training rows a phase {same}")
    retrain.add_argument("--batch-size", type=int, help=f"rows a step and rank {same}")
    retrain.add_argument("--seed", type=int, help=f"of the rows' order {same}")
    _add_resets(retrain)

    emit = commands.add_parser("emit", help="pack a retrained model and evaluate it on the test rows")
    emit.add_argument("--retrained", type=Path, required=True, help="folder of a finished retraining")
    emit.add_argument("--out", type=Path, required=True, help="folder of the packed model")

    pipeline = commands.add_parser("pipeline", help="search, retrain and emit into --out/search, retrain and artifact")
    add_data_options(pipeline, prepared=True)
    _add_search_options(pipeline)
    _add_resets(pipeline)
    pipeline.add_argument("--out", type=Path, required=True, help="folder of the three stages' folders")

    for command in (search, retrain, emit, pipeline):
        _add_run_options(command)
    return top


def _add_search_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("training")
    group.add_argument("--model", choices=["dlrm", "dnn"], default="dnn", help="(default: dnn)")
    group.add_argument("--dim", type=int, default=16, help="embedding dimension, a multiple of 4 (default: 16)")
    group.add_argument("--epochs", type=int, default=1, help="passes over the training rows a phase (default: 1)")
    group.add_argument("--batch-size", type=int, default=512, help="rows a step and rank (default: 512)")
    group.add_argument("--seed", type=int, default=0, help="of initial values and the rows' order (default: 0)")
    group.add_argument(
        "--penalty", type=float, default=SearchConfig.penalty_weight, help="lambda (default: %(default)s)"
    )
    group.add_argument("--penalty-kind", choices=["bits", "paper"], default="bits", help="(default: bits)")
    group.add_argument("--grouping", choices=["log_rank", "paper"], default="log_rank", help="(default: log_rank)")


def _add_resets(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--resets",
        type=int,
        default=3,
        help="how often rows go back to their initial values, the phases of retraining (default: 3)",
    )


def _add_run_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("running")
    group.add_argument("--device", choices=["cpu", "cuda"], help="(default: cuda where there is one)")
    group.add_argument(
        "--sharding-types",
        nargs="+",
        choices=[kind.value for kind in ShardingType],
        default=list(SHARDING_TYPES),
        metavar="TYPE",
        help=f"what the planner may choose (default: {' '.join(SHARDING_TYPES)})",
    )
    group.add_argument("--checkpoint-every", type=int, default=1000, help="steps between checkpoints (default: 1000)")
    group.add_argument(
        "--checkpoint-asynchronously",
        action="store_true",
        help="write checkpoints while training goes on, from a copy in host memory",
    )
    group.add_argument("--log-every", type=int, default=100, help="steps between writes of steps.jsonl (default: 100)")
    group.add_argument(
        "--timeout",
        type=float,
        default=600,
        help="seconds that a rank waits for the others before it gives up (default: 600)",
    )
    group.add_argument("--progress", action="store_true", help="show progress bars")


def check(options: argparse.Namespace) -> None:
    """Find mistakes before any work is done.

    Raises:
        UserError: naming the option.
    """
    least = {
        "dim": 4, "epochs": 1, "batch_size": 2, "resets": 1, "min_count": 1, "seed": 0, "penalty": 0,
        "checkpoint_every": 1, "log_every": 1, "timeout": 1,
    }  # fmt: skip
    for name, low in least.items():
        value = getattr(options, name, None)
        if value is not None and not low <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if getattr(options, "dim", 4) % 4:
        raise UserError(f"--dim must be a multiple of 4, as FBGEMM's tables need, got {options.dim}")


def search_settings(options: argparse.Namespace, out: Path) -> JobSettings:
    """The settings of a search into ``out``."""
    prepared = options.format == "prepared"
    log = {name: getattr(options, name) for name in _DATA_OPTIONS}
    return JobSettings(
        stage="search",
        log={} if prepared else {"log": str(options.data.resolve()), **log},
        data=str((options.data if prepared else out / "data").resolve()),
        search=None,
        model=options.model,
        dim=options.dim,
        epochs=options.epochs,
        resets=0,
        batch_size=options.batch_size,
        seed=options.seed,
        penalty=options.penalty,
        penalty_kind=options.penalty_kind,
        grouping=options.grouping,
    )
