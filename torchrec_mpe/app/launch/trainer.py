"""One rank of a job: `torchrun --nproc_per_node 2 -m torchrec_mpe.app.launch.trainer search --format ... --out ...`."""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.launch import stage_folders
from torchrec_mpe.app.launch.command_line import parser, search_settings
from torchrec_mpe.app.launch.job import JOB_FILE, JobSettings
from torchrec_mpe.app.launch.lost_ranks import RankLostError, name_lost_ranks
from torchrec_mpe.app.launch.prepare_once import prepare_once
from torchrec_mpe.app.training.method import Method
from torchrec_mpe.app.training.options import check_options, run_settings_of
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.app.training.quiet import quiet_dependencies
from torchrec_mpe.app.training.settings import RunSettings
from torchrec_mpe.app.training.stages import Job
from torchrec_mpe.app.training.step_log import StepLog
from torchrec_mpe.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank; returns the exit code: 0, or 2 for a user's mistake. Ends with 3 if another rank is lost."""
    options = parser().parse_args(arguments)
    try:
        _run(options)
    except UserError as error:
        print(f"torchrec-mpe: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


@record  # torchelastic's report then has the error, and the line of code that waited
def _run(options: argparse.Namespace) -> None:
    check_options(options, searches=True)
    quiet_dependencies()
    run = run_settings_of(options)
    with process_group(run.device, run.timeout):
        restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        print(
            f"rank {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()}: process {os.getpid()}, "
            f"{run.device}, restart {restart}",
            flush=True,
        )
        _warn_of_shared_store()
        log = StepLog(options.log_every, restart)
        try:
            with name_lost_ranks(lambda: log.place, run.timeout):
                _run_command(options, run, log)
        except RankLostError as error:
            get_error_handler().record_exception(error)
            print(f"torchrec-mpe: error: {error}", file=sys.stderr, flush=True)
            # Not through the process group's end, which may wait for the lost rank as well.
            os._exit(3)


def _run_command(options: argparse.Namespace, run: RunSettings, log: StepLog) -> None:
    if options.command == "search":
        _search(options, run, log, options.out)
    elif options.command == "retrain":
        _retrain(options, run, log, options.search, options.out)
    elif options.command == "emit":
        _emit(run, options.retrained, options.out)
    else:
        retrained, artifact = options.out / "retrain", options.out / "artifact"
        stage_folders.check_artifact(artifact, retrained)
        _search(options, run, log, options.out / "search")
        _retrain(options, run, log, options.out / "search", retrained)
        _emit(run, retrained, artifact)


def _warn_of_shared_store() -> None:
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if dist.get_rank() == 0 and shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        print(
            "torchrec-mpe: warning: restarts can fail to connect because torchrun keeps its store over them: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, as the torchx components do",
            file=sys.stderr,
            flush=True,
        )


def _search(options: argparse.Namespace, run: RunSettings, log: StepLog, out: Path) -> None:
    settings = search_settings(options, out)
    if _enter(settings, out):
        data = prepare_once(options, Path(settings.data))
        log.write_to(out / stage_folders.STEPS if dist.get_rank() == 0 else None)
        stage_folders.search(_job(settings, run, data), out, log)


def _retrain(options: argparse.Namespace, run: RunSettings, log: StepLog, search: Path, out: Path) -> None:
    searched = JobSettings.load(search)
    if searched.stage != "search" or not stage_folders.finished(search):
        raise UserError(f"{search} is not the folder of a finished search: run the search to its end first")
    given = {name: getattr(options, name) for name in ("epochs", "batch_size", "seed")}
    settings = replace(
        searched,
        stage="retrain",
        log={},
        search=str(search.resolve()),
        resets=options.resets,
        **{name: value for name, value in given.items() if value is not None},
    )
    if _enter(settings, out):
        log.write_to(out / stage_folders.STEPS if dist.get_rank() == 0 else None)
        stage_folders.retrain(_job(settings, run), search, out, log)


def _emit(run: RunSettings, retrained: Path, out: Path) -> None:
    settings = JobSettings.load(retrained)
    if settings.stage != "retrain" or not stage_folders.finished(retrained):
        raise UserError(f"{retrained} is not the folder of a finished retraining: run the retraining to its end first")
    if stage_folders.check_artifact(out, retrained):
        if dist.get_rank() == 0:
            print(f"{out} holds the packed model: nothing to do", flush=True)
        return
    stage_folders.emit(_job(settings, run), retrained, out)


def _job(settings: JobSettings, run: RunSettings, data: PreparedDataset | None = None) -> Job:
    return Job(Method.parse("mpe"), data or PreparedDataset.open(settings.data), settings, run)


def _enter(settings: JobSettings, out: Path) -> bool:
    """Make or join the folder of a stage; False if the stage is finished.

    Raises:
        UserError: if the folder is another job's, or this rank does not see what rank 0 wrote.
    """
    trained = (out / stage_folders.CHECKPOINTS).exists()
    settings.check_same(out, trained=trained)
    dist.barrier()
    if dist.get_rank() == 0 and not trained:
        settings.save(out)
    dist.barrier()
    if not (out / JOB_FILE).exists():
        raise UserError(
            f"rank {dist.get_rank()} on {socket.gethostname()} does not see {out}, which rank 0 wrote: give a folder "
            "that all nodes share"
        )
    if stage_folders.finished(out) and dist.get_rank() == 0:
        print(f"{out} holds a finished {settings.stage}: nothing to do", flush=True)
    return not stage_folders.finished(out)


if __name__ == "__main__":
    sys.exit(main())
