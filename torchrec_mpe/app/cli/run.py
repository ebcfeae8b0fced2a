"""`torchrec-mpe run`: the whole job, from a click log to packed models and a report."""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from torchrec_mpe.app.cli.output import check_output
from torchrec_mpe.app.cli.result_table import result_table
from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.data.formats import add_data_options, log_description, open_prepared, prepare_data, print_notes
from torchrec_mpe.app.data.log_files import log_files, shown_paths
from torchrec_mpe.app.data.split import SPLITS
from torchrec_mpe.app.hardware import cpu_name
from torchrec_mpe.app.report.data import CodedTable, ReportData
from torchrec_mpe.app.report.numerals import auc_text
from torchrec_mpe.app.report.write import write_report
from torchrec_mpe.app.training.method import FORMS, Method
from torchrec_mpe.app.training.options import SETTINGS, add_options, check_options, run_settings_of, settings_of
from torchrec_mpe.app.training.pipeline import Outcome, run_pipeline
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.app.training.quiet import quiet_dependencies
from torchrec_mpe.app.training.settings import RunSettings, Settings
from torchrec_mpe.app.training.stages import Job, Trained
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.inference.artifact.save_load import save
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.upstream.versions import __version__, installed_versions

_DATA = "data"


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
        help=f"{', '.join(FORMS)}; of caches the fraction of rows that they hold, perhaps with :lru or :lfu; of coded "
        "tables the ratio, perhaps with :nodistill; several "
        "allowed (default: fp32 coded:100 mpe)",
    )
    group.add_argument("--seed", type=int, nargs="+", default=[0], help="one or more seeds (default: 0)")
    add_options(group, [*SETTINGS, "device"], without=["seed"])
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, required=True, help="folder for models, plans and the report")
    output.add_argument("--json", type=Path, help="also write the results to this file")
    output.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    """Prepare the data, run every method with every seed, and report."""
    methods, settings, how = check(options, reusable=_DATA)
    with no_empty_folder(options.out):
        data = _prepared(options)
        print_notes(data)
        return compare(options, [Job(method, data, settings, how) for method in methods])


def _prepared(options: argparse.Namespace) -> PreparedDataset:
    """The log, prepared into --out, or found there as an earlier run with the same options has left it.

    Raises:
        UserError: for a mistake in the log or in the options, or if what is found is of other ones.
    """
    folder = options.out / _DATA
    prepared = open_prepared(options)
    if prepared is not None:
        if folder.exists():
            raise UserError(f"--out {options.out} already exists and is not an empty folder: choose another")
        return prepared
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in log_files(options.data)]
    source = json.dumps({**log_description(options), "files": files}, indent=2) + "\n"
    file = folder / "source.json"
    if not folder.exists():
        data = prepare_data(options, folder, progress=not options.quiet)
        with atomic_file(file) as temporary:
            temporary.write_text(source)
        return data
    if not file.is_file() or file.read_text() != source:
        raise UserError(
            f"{folder} holds data of another log or other options: choose another --out, or remove the folder"
        )
    print(f"note: {folder} is prepared already and used again")
    return PreparedDataset.open(folder)


@contextmanager
def no_empty_folder(path: Path) -> Iterator[None]:
    """Do not leave ``path`` behind if the block fails before anything complete is in it."""
    try:
        yield
    except BaseException:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        raise


def check(options: argparse.Namespace, *, reusable: str | None = None) -> tuple[list[Method], Settings, RunSettings]:
    """Methods and settings from the options, before any work is done; ``reusable`` may be in --out already.

    Raises:
        UserError: for options that cannot be.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this command runs in one process: for several, launch a script of your own such as swap_in.py")
    options.seed = list(dict.fromkeys(options.seed))
    methods = [Method.parse(name) for name in dict.fromkeys(options.method or ["fp32", "coded:100", "mpe"])]
    check_options(options, searches=any(method.searches for method in methods))
    check_output(options, reusable=reusable)
    how = replace(run_settings_of(options), progress=not options.quiet)
    return methods, settings_of(options, seed=options.seed[0]), how


def compare(options: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """Run one job a method, with every seed; each result is written as it is complete.

    A method that does not fit the data, or fails, is left out with a warning; the others run.

    Raises:
        UserError: if no method comes to a result.
    """
    quiet_dependencies()
    outcomes: list[Outcome] = []
    codings: dict[str, dict[str, CodedTable]] = {}
    left_out: dict[str, UserError] = {}
    with process_group(jobs[0].run.device):
        jobs = _with_batches_that_fit(jobs)
        for job in jobs:
            try:
                job.check()
            except UserError as error:
                left_out[job.method.name] = error
        jobs = [job for job in jobs if job.method.name not in left_out]
        if not jobs:
            raise next(iter(left_out.values()))
        for name, reason in left_out.items():
            _warn_left_out(name, reason)
        for seed in options.seed:
            teacher: Trained | None = None
            for number, job in enumerate(jobs):
                is_coded = job.method.kind == "coded"
                seeded = replace(job, settings=replace(job.settings, seed=seed))
                try:
                    outcome = run_pipeline(seeded, teacher if is_coded else None)
                except UserError as error:
                    if len(jobs) * len(options.seed) == 1:
                        raise
                    name = f"{job.method.name} seed {seed}"
                    left_out[name] = error
                    _warn_left_out(name, error)
                    continue
                r = outcome.record
                folder = options.out / f"{r['method'].replace(':', '-')}-seed{seed}"
                if outcome.plan is not None:
                    outcome.plan.save(folder / "plan.json")
                if outcome.plan is not None or is_coded:
                    save(outcome.model, folder / "artifact", plan=outcome.plan, metadata={"result": r})
                if is_coded:
                    codings.setdefault(job.method.name, _codings(outcome.model))
                if job.method.kind in ("fp32", "coded"):
                    # Tables are coded from the fp32 model that is trained already.
                    wanted = any(other.method.kind == "coded" for other in jobs[number + 1 :])
                    teacher = outcome.trained if wanted else None
                # The trained model is not kept: the next method needs its memory.
                outcome.model, outcome.trained = torch.nn.Identity(), None
                outcomes.append(outcome)
                _write_records(options, outcomes)
                hits = ""
                if "hit_rate" in r:
                    ratio = r["fp32_training_bytes"] / r["training_bytes"]
                    hits = f"{r['training_bytes']:,} in training ({ratio:.1f}x), hit rate {r['hit_rate']:.1%}, "
                print(
                    f"{r['method']} seed {seed}: AUC {auc_text(r['auc'])}, {r['embedding_bytes']:,} bytes "
                    f"({r['compression_ratio']:.1f}x), {hits}{r['seconds']:.0f} s",
                    flush=True,
                )
    if not outcomes:
        raise UserError(f"no method came to a result; the last one: {list(left_out.values())[-1]}")
    page = write_report(options.out, _report_data(options, jobs[0], outcomes, codings, left_out))
    print()
    print(result_table([outcome.record for outcome in outcomes]))
    print(f"\nreport: {page}")
    return 0


def _with_batches_that_fit(jobs: Sequence[Job]) -> Sequence[Job]:
    """The jobs, with smaller batches where there are fewer training rows than one batch has."""
    rows, size = jobs[0].data.num_rows("train"), jobs[0].settings.batch_size
    if rows >= size:
        return jobs
    smaller = max(2, 1 << (max(1, rows // 8).bit_length() - 1))
    print(f"note: {rows} training rows are fewer than one batch of {size}: batches have {smaller} rows instead")
    return [replace(job, settings=replace(job.settings, batch_size=smaller)) for job in jobs]


def _warn_left_out(name: str, reason: UserError) -> None:
    print(f"torchrec-mpe: warning: {name} is left out: {reason}", file=sys.stderr, flush=True)


def _write_records(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    """The records so far: a run that is cut off keeps what it has finished."""
    text = json.dumps([outcome.record for outcome in outcomes], indent=2) + "\n"
    for path in (options.out / "results.json", options.json):
        if path is not None:
            with atomic_file(path) as temporary:
                temporary.write_text(text)


def _codings(model: torch.nn.Module) -> dict[str, CodedTable]:
    """What coding made of the tables of a packed model, by name."""
    found: dict[str, CodedTable] = {}
    for module in model.modules():
        if isinstance(module, PackedEmbeddingBagCollection):
            sizes = {size.name: size.total for size in module.size_report().tables}
            for layout in module.packed_tables().layouts():
                found[layout.name] = CodedTable(layout, module.summaries[layout.name], sizes[layout.name])
    return found


def _report_data(
    options: argparse.Namespace,
    job: Job,
    outcomes: Sequence[Outcome],
    codings: Mapping[str, Mapping[str, CodedTable]],
    left_out: Mapping[str, UserError],
) -> ReportData:
    data, settings = job.data, job.settings
    first_seed = {o.record["method"]: o for o in reversed(outcomes)}
    return ReportData(
        title=f"Mixed-precision embeddings on {shown_paths([Path(path.name) for path in options.data])}",
        results=[o.record for o in outcomes],
        curves=[
            {"method": o.record["method"], "seed": o.record["seed"], "phase": phase, **vars(curve)}
            for o in outcomes
            for phase, curve in o.curves.items()
        ],
        plans={name: o.plan.tables for name, o in first_seed.items() if o.plan is not None},
        codings=codings,
        counts=job.counts,
        probabilities={name: o.probabilities for name, o in first_seed.items() if o.probabilities is not None},
        candidate_bits=settings.search_config.candidate_bits,
        environment={
            "torchrec_mpe": __version__,
            **installed_versions(),
            "Python": platform.python_version(),
            "device": torch.cuda.get_device_name() if job.run.device.type == "cuda" else cpu_name(),
            "threads": str(torch.get_num_threads()),
            "command": shlex.join(["torchrec-mpe", *sys.argv[1:]]),
        },
        data={
            "log": shown_paths(options.data),
            **{f"{split} rows": data.num_rows(split) for split in SPLITS},
            "fields": len(data.fields),
            "ids": sum(field.num_embeddings for field in data.fields),
            "embedding dimension": settings.dim,
            "model": settings.model,
            "resets": settings.resets,
            **{f"left out: {name}": str(reason) for name, reason in left_out.items()},
        },
    )
