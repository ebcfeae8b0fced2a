"""The options of training, of `torchrec-mpe run` and of a job's ranks alike."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from typing import Any, get_args

import torch
from torchrec.distributed.types import ShardingType

from torchrec_mpe.app.models import ModelKind
from torchrec_mpe.app.training.settings import RunSettings, Settings
from torchrec_mpe.errors import UserError
from torchrec_mpe.modules.search_config import Grouping, Penalty

_SETTINGS: dict[str, dict[str, Any]] = {
    "seed": {"help": "of initial values and the rows' order"},
    "model": {"choices": get_args(ModelKind), "help": "the dense network"},
    "dim": {"help": "embedding dimension, a multiple of 4"},
    "epochs": {"help": "passes over the training rows a phase"},
    "resets": {"help": "how often rows go back to their initial values; phases are one more, a search the first"},
    "batch_size": {"help": "rows a step and rank"},
    "penalty": {"help": "lambda of a search"},
    "penalty_kind": {"choices": get_args(Penalty), "help": "of a search"},
    "grouping": {"choices": get_args(Grouping), "help": "of a search"},
}
_LEAST = {
    "seed": 0, "dim": 4, "epochs": 1, "batch_size": 2, "resets": 0, "min_count": 1, "penalty": 0,
    "checkpoint_every": 1, "log_every": 1, "timeout": 1,
}  # fmt: skip


def add_settings(
    parser: argparse.ArgumentParser,
    names: Sequence[str] = tuple(_SETTINGS),
    *,
    without: Sequence[str] = (),
    inherited_from: str = "",
) -> None:
    """Add options of :class:`Settings`; those of ``inherited_from`` are None unless given."""
    group = parser.add_argument_group("training")
    for name in (name for name in names if name not in without):
        default = getattr(Settings, name)
        words = {"type": type(default), "default": None if inherited_from else default, **_SETTINGS[name]}
        words["help"] += f" (default: {inherited_from or '%(default)s'})"
        group.add_argument(f"--{name.replace('_', '-')}", **words)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the choice of the device."""
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: cuda where there is one)")


def add_run_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options of :class:`RunSettings`."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--sharding-types",
        nargs="+",
        choices=[kind.value for kind in ShardingType],
        default=list(RunSettings.sharding_types),
        metavar="TYPE",
        help=f"what the planner may choose (default: {' '.join(RunSettings.sharding_types)})",
    )
    group.add_argument(
        "--checkpoint-every",
        type=int,
        default=RunSettings.checkpoint_every,
        help="steps between checkpoints (default: %(default)s)",
    )
    group.add_argument(
        "--checkpoint-asynchronously",
        action="store_true",
        help="write checkpoints while training goes on, from a copy in host memory",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=RunSettings.timeout.total_seconds(),
        help="seconds that a rank waits for the others before it gives up (default: %(default)s)",
    )
    group.add_argument("--progress", action="store_true", help="show progress bars")


def check_options(options: argparse.Namespace, *, searches: bool) -> None:
    """Find mistakes before any work is done; a job that ``searches`` needs a phase to retrain in.

    Raises:
        UserError: naming the option.
    """
    for name, least in _LEAST.items():
        given = getattr(options, name, None)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            if not least <= value < float("inf"):
                must = f"be at least {least}" if least else "not be negative"
                raise UserError(f"--{name.replace('_', '-')} must {must}, got {value}")
    if searches and getattr(options, "resets", 1) < 1:
        raise UserError("--resets must be at least 1 with method mpe: it searches first and retrains after a reset")
    if (getattr(options, "dim", None) or 4) % 4:
        raise UserError(f"--dim must be a multiple of 4, as FBGEMM's tables need, got {options.dim}")


def settings_of(options: argparse.Namespace, **others: Any) -> Settings:
    """The settings that the options name, but for ``others``."""
    return Settings(**{f.name: others.get(f.name, getattr(options, f.name, f.default)) for f in fields(Settings)})


def run_settings_of(options: argparse.Namespace) -> RunSettings:
    """How the options want the job to run, on the device of this rank.

    Raises:
        UserError: if there is no such device.
    """
    device = torch.device("cpu")
    if options.device == "cuda" or (options.device is None and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA GPU; `torchrec-mpe doctor` says why")
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: torch sees {torch.cuda.device_count()} here; start one rank a "
                "GPU, or give --device cpu"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    given = {f.name: getattr(options, f.name) for f in fields(RunSettings) if hasattr(options, f.name)}
    if "timeout" in given:
        given |= {"timeout": timedelta(seconds=options.timeout), "sharding_types": tuple(options.sharding_types)}
    return RunSettings(**{**given, "device": device})
