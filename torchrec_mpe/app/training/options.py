"""The options of training, of `torchrec-mpe run` and of a job's ranks alike."""

import argparse
import os
from collections.abc import Iterable
from dataclasses import fields
from datetime import timedelta
from typing import Any, get_args

import torch
from torchrec.distributed.types import ShardingType

from torchrec_mpe.app.models import ModelKind
from torchrec_mpe.app.training.settings import RunSettings, Settings
from torchrec_mpe.errors import UserError
from torchrec_mpe.modules.search_config import Grouping, Penalty

_OPTIONS: dict[str, dict[str, Any]] = {
    "seed": {"help": "of initial values and the rows' order"},
    "model": {"choices": get_args(ModelKind), "help": "the dense network"},
    "dim": {"help": "embedding dimension, a multiple of 4"},
    "epochs": {"help": "passes over the training rows a phase"},
    "resets": {"help": "how often rows go back to their initial values; phases are one more, a search the first"},
    "batch_size": {"help": "rows a step and rank"},
    "penalty": {"help": "lambda of a search"},
    "penalty_kind": {"choices": get_args(Penalty), "help": "of a search"},
    "grouping": {"choices": get_args(Grouping), "help": "of a search"},
    "device": {
        "type": str,
        "choices": ["cpu", "cuda"],
        "default": None,
        "help": "cuda where there is one, unless given",
    },
    "sharding_types": {
        "nargs": "+",
        "type": str,
        "choices": [kind.value for kind in ShardingType],
        "metavar": "TYPE",
        "help": "what the planner may choose",
    },
    "checkpoint_every": {"help": "steps between checkpoints"},
    "checkpoint_asynchronously": {"help": "write checkpoints while training goes on, from a copy in host memory"},
    "timeout": {"type": float, "default": 600.0, "help": "seconds that a rank waits for the others before it gives up"},
    "progress": {"help": "show progress bars"},
}
SETTINGS = tuple(f.name for f in fields(Settings))
RUN_SETTINGS = tuple(f.name for f in fields(RunSettings))
_LEAST = {
    "seed": 0, "dim": 4, "epochs": 1, "batch_size": 2, "resets": 0, "min_count": 1, "penalty": 0,
    "checkpoint_every": 1, "log_every": 1, "timeout": 1,
}  # fmt: skip


def add_options(
    parser: "argparse._ActionsContainer", names: Iterable[str], *, without: Iterable[str] = (), inherited_from: str = ""
) -> None:
    """Add options by the names of their settings; those of ``inherited_from`` are None unless given."""
    for name in (name for name in names if name not in without):
        default = getattr(Settings if name in SETTINGS else RunSettings, name, None)
        words = {"type": type(default), "default": default, **_OPTIONS[name]}
        if default is False:
            words = {"action": "store_true", **_OPTIONS[name]}
        elif inherited_from:
            words |= {"default": None, "help": f"{words['help']} (default: {inherited_from})"}
        elif words["default"] is not None:
            shown = words["default"]
            words["help"] += f" (default: {' '.join(shown) if isinstance(shown, tuple) else shown})"
        parser.add_argument(f"--{name.replace('_', '-')}", **words)


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
