"""The stages of a job, each from one folder to the next: search, retrain, emit. Every rank calls them."""

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import PlannerError

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.launch.job import JobSettings
from torchrec_mpe.app.models import build_model
from torchrec_mpe.app.training.loop import evaluate, shard, train_phase
from torchrec_mpe.app.training.methods import emit_with_sizes, tables_and_counts
from torchrec_mpe.app.training.phase_checkpoints import PhaseCheckpoints
from torchrec_mpe.app.training.step_log import StepLog
from torchrec_mpe.distributed.checkpoint.checkpoint import Checkpoint
from torchrec_mpe.distributed.checkpoint.checkpoints import Checkpoints
from torchrec_mpe.distributed.phases import prepare_retrain_, prepare_search_, reset_rows_
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.inference.artifact.save_load import save
from torchrec_mpe.modules.sampling import sample_precision
from torchrec_mpe.precision.frequency_counter import FrequencyCounter

PLAN = "plan.json"
COUNTS = "counts.safetensors"
RESULTS = "results.json"
CHECKPOINTS = "checkpoints"
STEPS = "steps.jsonl"


@dataclass(frozen=True)
class RunSettings:
    """How a job runs, which its result does not depend on but for rounding.

    Attributes:
        device (torch.device): of this rank.
        timeout (timedelta): how long a rank waits for the others.
        checkpoint_every (int): steps between checkpoints.
        checkpoint_asynchronously (bool): write them while training goes on, from a copy in host memory.
        sharding_types (tuple[str, ...]): values of TorchRec's ShardingType that the planner may choose.
        progress (bool): show progress bars.
    """

    device: torch.device
    timeout: timedelta
    checkpoint_every: int
    checkpoint_asynchronously: bool
    sharding_types: tuple[str, ...]
    progress: bool


def search(settings: JobSettings, run: RunSettings, data: PreparedDataset, out: Path, log: StepLog) -> None:
    """Search, or go on with the search in ``out``; leaves plan.json, counts.safetensors, results.json, checkpoints.

    Raises:
        UserError: if the data is too small for the batches, or training diverges.
    """
    _check_rows(data, settings)
    _, counts = tables_and_counts(data, settings.dim)
    checkpoints = Checkpoints(out / CHECKPOINTS, timeout=run.timeout)
    dmp = _shard(prepare_search_(_model(settings, run, data), counts, settings.search_config), settings, run)
    train_phase(
        dmp,
        data,
        settings.hyperparameters,
        phase="search",
        epochs=settings.epochs,
        seed=settings.seed * 100,
        penalize_bits=True,
        progress=run.progress,
        checkpoints=PhaseCheckpoints(
            checkpoints,
            0,
            0,
            run.checkpoint_every,
            found=checkpoints.newest(),
            counts=counts,
            asynchronous=run.checkpoint_asynchronously,
        ),
        step_log=log,
    )
    checkpoints.wait()
    try:
        plan = sample_precision(dmp)
    except ValueError as error:
        raise UserError(str(error)) from error
    validation = evaluate(dmp, data, "validation", run.device)
    if dist.get_rank() == 0:
        FrequencyCounter.from_counts(counts).save(out / COUNTS)
        plan.save(out / PLAN)
        packed = plan.size_report()
        _write_results(
            out,
            {
                "validation": validation,
                "average_bits": plan.average_bits,
                "embedding_bytes": packed.total,
                "fp32_bytes": packed.fp32_bytes,
                "compression_ratio": packed.compression_ratio,
            },
        )
        print(plan.summary(), flush=True)
    dist.barrier()


def retrain(
    settings: JobSettings, run: RunSettings, data: PreparedDataset, search_folder: Path, out: Path, log: StepLog
) -> None:
    """Retrain at the bit-widths of a search, or go on with the retraining in ``out``; leaves results.json, checkpoints.

    Raises:
        UserError: if the search is not finished, the data is too small for the batches, or training diverges.
    """
    _check_rows(data, settings)
    checkpoints = Checkpoints(out / CHECKPOINTS, timeout=run.timeout)
    if checkpoints.newest() is None:
        _save_start(settings, run, data, search_folder, checkpoints)
    # Also without an interruption from the checkpoint: sharded as it will be after one.
    found = _newest(checkpoints, out)
    plan = found.plan()
    dmp = _shard(found.prepare_(_model(settings, run, data)), settings, run)
    steps = settings.epochs * data.num_batches(
        "train", settings.batch_size, drop_last=True, world_size=dist.get_world_size()
    )
    for phase in range(found.position["phase"], settings.resets + 1):
        if phase > found.position["phase"]:
            reset_rows_(dmp, plan.initialization)
        train_phase(
            dmp,
            data,
            settings.hyperparameters,
            phase=f"retrain {phase} of {settings.resets}",
            epochs=settings.epochs,
            seed=settings.seed * 100 + phase,
            progress=run.progress,
            checkpoints=PhaseCheckpoints(
                checkpoints,
                phase,
                1 + (phase - 1) * steps,  # the start is checkpoint 0
                run.checkpoint_every,
                found=found if phase == found.position["phase"] else None,
                plan=plan,
                asynchronous=run.checkpoint_asynchronously,
            ),
            step_log=log,
        )
    checkpoints.wait()
    validation = evaluate(dmp, data, "validation", run.device)
    if dist.get_rank() == 0:
        plan.save(out / PLAN)
        _write_results(out, {"validation": validation})
    dist.barrier()


def emit(settings: JobSettings, run: RunSettings, data: PreparedDataset, retrained: Path, out: Path) -> None:
    """Pack the retrained model of a folder, check it against the retrained one, evaluate it, and save it.

    Raises:
        RuntimeError: if the packed model does not predict what the retrained one does.
    """
    checkpoints = Checkpoints(retrained / CHECKPOINTS, timeout=run.timeout)
    found = _newest(checkpoints, retrained)
    plan = found.plan()
    dmp = _shard(found.prepare_(_model(settings, run, data)), settings, run)
    checkpoints.load(dmp, None, found, optimizer_state=False)
    emitted, sizes = emit_with_sizes(dmp, plan)
    results = {"test": evaluate(emitted, data, "test", run.device), **sizes}
    if dist.get_rank() == 0:
        save(emitted, out, plan=plan, metadata={"result": results, "retrained": str(retrained.resolve())})
        print(
            f"{out}: AUC {results['test']['auc']:.4f}, {results['embedding_bytes']:,} bytes "
            f"({results['compression_ratio']:.1f}x)",
            flush=True,
        )
    dist.barrier()


def finished(folder: Path) -> bool:
    """Whether the search or retraining in a folder has come to its end."""
    return (folder / RESULTS).exists()


def emitted_from(folder: Path, retrained: Path) -> bool:
    """Whether a folder holds the packed model of a retraining: it appears complete or not at all."""
    try:
        document = json.loads((folder / "manifest.json").read_text())
        source: str = document["metadata"]["retrained"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return source == str(retrained.resolve())


def _save_start(
    settings: JobSettings, run: RunSettings, data: PreparedDataset, search_folder: Path, checkpoints: Checkpoints
) -> None:
    """The first checkpoint of a retraining: what the search came to, bit-widths fixed, rows at their initial values."""
    searched = Checkpoints(search_folder / CHECKPOINTS, timeout=run.timeout)
    found = _newest(searched, search_folder)
    dmp = _shard(found.prepare_(_model(settings, run, data)), settings, run)
    searched.load(dmp, None, found, optimizer_state=False)
    plan = sample_precision(dmp)
    prepare_retrain_(dmp, plan)
    checkpoints.save(dmp, step=0, position={"phase": 1, "epoch": 0, "batch": 0}, plan=plan)
    del dmp
    gc.collect()  # modules and their hooks refer to each other


def _model(settings: JobSettings, run: RunSettings, data: PreparedDataset) -> nn.Module:
    torch.manual_seed(settings.seed)
    tables, _ = tables_and_counts(data, settings.dim)
    return build_model(settings.model, tables, len(data.dense_names), device=run.device)


def _shard(model: nn.Module, settings: JobSettings, run: RunSettings) -> DistributedModelParallel:
    try:
        return shard(model, settings.hyperparameters, run.device, run.sharding_types)
    except PlannerError as error:
        raise UserError(f"the tables cannot be sharded: {error}") from error


def _newest(checkpoints: Checkpoints, folder: Path) -> Checkpoint:
    found = checkpoints.newest()
    if found is None:
        raise UserError(f"{folder / CHECKPOINTS} holds no complete checkpoint, though the stage was finished")
    return found


def _check_rows(data: PreparedDataset, settings: JobSettings) -> None:
    ranks = dist.get_world_size()
    if not data.num_batches("train", settings.batch_size, drop_last=True, world_size=ranks):
        raise UserError(
            f"{data.path} has {data.num_rows('train')} training rows, fewer than one batch of {settings.batch_size} on "
            f"each of {ranks} ranks: use a smaller --batch-size or fewer ranks"
        )
    for split in ("validation", "test"):
        if data.num_rows(split) < ranks:
            raise UserError(f"{data.path} has {data.num_rows(split)} {split} rows for {ranks} ranks: use fewer ranks")


def _write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Written last: a folder with results is finished."""
    with atomic_file(folder / RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
