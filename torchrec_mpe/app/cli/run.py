"""`torchrec-mpe run`: the whole job, from a click log to packed models and a report."""

import argparse
import json
import logging
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torchrec_mpe.app.cli.result_table import result_table
from torchrec_mpe.app.data.data_options import add_data_options, prepare_data, print_notes
from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.hardware import cpu_name
from torchrec_mpe.app.report.data import ReportData
from torchrec_mpe.app.report.write import write_report
from torchrec_mpe.app.training.loop import Hyperparameters
from torchrec_mpe.app.training.methods import Job, Method, Outcome, check_fit, run_method
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.inference.artifact.save_load import save
from torchrec_mpe.modules.search_config import SearchConfig
from torchrec_mpe.upstream.versions import __version__, installed_versions


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser("run", help="train, search, retrain, pack and compare on a click log")
    add_data_options(parser, prepared=True)
    add_run_options(parser)
    parser.set_defaults(run=run)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of training and output, which `demo` shares."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--method",
        nargs="+",
        action="extend",
        metavar="METHOD",
        help="fp32, cache:int8:FRACTION, cache:int4:FRACTION (of the rows that the cache holds; perhaps with :lru or "
        ":lfu), uniform:BITS, cut:BITS:FRACTION, rule:RATIO, mpe; several allowed (default: fp32 rule:60 mpe)",
    )
    group.add_argument("--seed", type=int, nargs="+", default=[0], help="one or more seeds (default: 0)")
    group.add_argument("--model", choices=["dlrm", "dnn"], default="dnn", help="(default: dnn)")
    group.add_argument("--dim", type=int, default=16, help="embedding dimension, a multiple of 4 (default: 16)")
    group.add_argument("--epochs", type=int, default=1, help="passes over the training rows a phase (default: 1)")
    group.add_argument(
        "--resets",
        type=int,
        default=3,
        help="how often rows go back to their initial values; phases are one more (default: 3)",
    )
    group.add_argument("--batch-size", type=int, default=512, help="(default: 512)")
    group.add_argument(
        "--penalty", type=float, default=SearchConfig.penalty_weight, help="mpe: lambda (default: %(default)s)"
    )
    group.add_argument("--penalty-kind", choices=["bits", "paper"], default="bits", help="mpe (default: bits)")
    group.add_argument("--grouping", choices=["log_rank", "paper"], default="log_rank", help="mpe (default: log_rank)")
    group.add_argument("--device", choices=["cpu", "cuda"], help="(default: cuda where there is one)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, required=True, help="folder for models, plans and the report")
    output.add_argument("--json", type=Path, help="also write the results to this file")
    output.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    """Prepare the data, run every method with every seed, and report."""
    methods, job = check_options(options)
    with no_empty_folder(options.out):
        data = prepare_data(options, options.out / "data", progress=not options.quiet)
        print_notes(data)
        return compare(options, data, methods, job)


@contextmanager
def no_empty_folder(path: Path) -> Iterator[None]:
    """Do not leave ``path`` behind if the block fails before anything complete is in it."""
    try:
        yield
    except BaseException:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        raise


def check_options(options: argparse.Namespace) -> tuple[list[Method], Job]:
    """Methods and settings from the options, before any work is done.

    Raises:
        UserError: for options that cannot be.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this command runs in one process: for several, launch a script of your own such as swap_in.py")
    options.seed = list(dict.fromkeys(options.seed))
    if options.json is not None and options.json.is_dir():
        raise UserError(f"--json {options.json} is a folder: give the path of a file")
    methods = [Method.parse(name) for name in dict.fromkeys(options.method or ["fp32", "rule:60", "mpe"])]
    for name, least in (("dim", 4), ("epochs", 1), ("batch_size", 2), ("resets", 0), ("min_count", 1)):
        if getattr(options, name, least) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    if options.dim % 4:
        raise UserError(f"--dim must be a multiple of 4, as FBGEMM's tables need, got {options.dim}")
    if not 0 <= options.penalty < float("inf"):
        raise UserError(f"--penalty must not be negative, got {options.penalty}")
    if any(seed < 0 for seed in options.seed):
        raise UserError(f"--seed must not be negative, got {min(options.seed)}")
    if any(m.kind == "mpe" for m in methods) and options.resets < 1:
        raise UserError("--resets must be at least 1 with method mpe: it searches first and retrains after a reset")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU; `torchrec-mpe doctor` says why")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(f"--out {options.out} already exists and is not an empty folder: choose another")
    job = Job(
        model=options.model,
        embedding_dim=options.dim,
        epochs=options.epochs,
        resets=options.resets,
        search=SearchConfig(grouping=options.grouping, penalty=options.penalty_kind, penalty_weight=options.penalty),
        hyperparameters=Hyperparameters(batch_size=options.batch_size),
        device=_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        progress=not options.quiet,
    )
    return methods, job


def _device(kind: str) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def compare(options: argparse.Namespace, data: PreparedDataset, methods: Sequence[Method], job: Job) -> int:
    """Run methods and seeds; each result is written as it is complete."""
    _quiet_dependencies()
    if data.num_rows("train") < options.batch_size:
        raise UserError(
            f"{options.data} has {data.num_rows('train')} training rows, fewer than one batch of {options.batch_size}: "
            "use a smaller --batch-size"
        )
    for method in methods:
        check_fit(method, data, job)
    outcomes: list[tuple[Method, Outcome]] = []
    with process_group(job.device):
        for seed in options.seed:
            for method in methods:
                outcome = run_method(method, data, job, seed)
                folder = options.out / f"{method.name.replace(':', '-')}-seed{seed}"
                if outcome.plan is not None:
                    outcome.plan.save(folder / "plan.json")
                    save(outcome.model, folder / "artifact", plan=outcome.plan, metadata={"result": outcome.record})
                # The trained model is not kept: the next method needs its memory.
                outcome.model = torch.nn.Identity()
                outcomes.append((method, outcome))
                _write_records(options, outcomes)
                r = outcome.record
                hits = ""
                if "hit_rate" in r:
                    ratio = r["fp32_training_bytes"] / r["training_bytes"]
                    hits = f"{r['training_bytes']:,} in training ({ratio:.1f}x), hit rate {r['hit_rate']:.1%}, "
                print(
                    f"{method.name} seed {seed}: AUC {r['auc']:.4f}, {r['embedding_bytes']:,} bytes "
                    f"({r['compression_ratio']:.1f}x), {hits}{r['seconds']:.0f} s",
                    flush=True,
                )
    page = write_report(options.out, _report_data(options, data, outcomes, job))
    print()
    print(result_table([outcome.record for _, outcome in outcomes]))
    print(f"\nreport: {page}")
    return 0


def _write_records(options: argparse.Namespace, outcomes: Sequence[tuple[Method, Outcome]]) -> None:
    """The records so far: a run that is cut off keeps what it has finished."""
    text = json.dumps([outcome.record for _, outcome in outcomes], indent=2) + "\n"
    for path in (options.out / "results.json", options.json):
        if path is not None:
            with atomic_file(path) as temporary:
                temporary.write_text(text)


def _report_data(
    options: argparse.Namespace, data: PreparedDataset, outcomes: Sequence[tuple[Method, Outcome]], job: Job
) -> ReportData:
    first_seed = {m.name: o for m, o in reversed(outcomes)}
    return ReportData(
        title=f"Mixed-precision embeddings on {Path(options.data).name}",
        results=[o.record for _, o in outcomes],
        curves=[
            {
                "method": m.name,
                "seed": o.record["seed"],
                "phase": c.phase,
                "steps": c.steps,
                "loss": c.loss,
                "validation": c.validation,
                "caches": c.caches,
            }
            for m, o in outcomes
            for c in o.curves
        ],
        plans={name: o.plan.tables for name, o in first_seed.items() if o.plan is not None},
        counts={f"t_{field.name}": data.counts(field.name) for field in data.fields},
        probabilities={name: o.probabilities for name, o in first_seed.items() if o.probabilities is not None},
        candidate_bits=job.search.candidate_bits,
        environment=_environment(job),
        data=_data_facts(options, data),
    )


def _environment(job: Job) -> dict[str, str]:
    device = torch.cuda.get_device_name() if job.device.type == "cuda" else cpu_name()
    return {
        "torchrec_mpe": __version__,
        **installed_versions(),
        "Python": platform.python_version(),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "command": shlex.join(["torchrec-mpe", *sys.argv[1:]]),
    }


def _data_facts(options: argparse.Namespace, data: PreparedDataset) -> Mapping[str, Any]:
    facts: dict[str, Any] = {"log": str(options.data)}
    facts.update({f"{split} rows": data.num_rows(split) for split in ("train", "validation", "test")})
    facts["fields"] = len(data.fields)
    facts["ids"] = sum(field.num_embeddings for field in data.fields)
    facts["embedding dimension"] = options.dim
    facts["model"] = options.model
    facts["resets"] = options.resets
    return facts


def _quiet_dependencies() -> None:
    """TorchRec logs its plans, and torch warns about itself: none of it is for the person who runs this."""
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|torchrec|fbgemm_gpu|tensordict|torchmetrics")
