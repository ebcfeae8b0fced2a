"""The stages of a job, each from one folder to the next: search, retrain, emit. Every rank calls them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchrec_mpe.app.report.numerals import auc_text
from torchrec_mpe.app.training import stages
from torchrec_mpe.app.training.loop import evaluate
from torchrec_mpe.app.training.stages import Job
from torchrec_mpe.app.training.step_log import StepLog
from torchrec_mpe.distributed.checkpoint.checkpoints import Checkpoints
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.inference.artifact.save_load import save
from torchrec_mpe.precision.frequency_counter import FrequencyCounter

PLAN = "plan.json"
COUNTS = "counts.safetensors"
RESULTS = "results.json"
CHECKPOINTS = "checkpoints"
STEPS = "steps.jsonl"


def search(job: Job, out: Path, log: StepLog) -> None:
    """Search, or go on with the search in ``out``; leaves plan.json, counts.safetensors, results.json, checkpoints.

    Raises:
        UserError: if the data is too small for the batches, or training diverges.
    """
    job.check()
    searched = stages.search(job, _checkpoints(job, out), log)
    plan = stages.sample(job, searched)
    validation = evaluate(searched.model, job.data, "validation", job.run.device)
    if dist.get_rank() == 0:
        FrequencyCounter.from_counts(job.counts).save(out / COUNTS)
        plan.save(out / PLAN)
        packed = plan.size_report()
        sizes = {
            "average_bits": plan.average_bits,
            "embedding_bytes": packed.total,
            "fp32_bytes": packed.fp32_bytes,
            "compression_ratio": packed.compression_ratio,
        }
        _write_results(out, {"validation": validation, **sizes})
        print(plan.summary(), flush=True)
    dist.barrier()


def retrain(job: Job, search_folder: Path, out: Path, log: StepLog) -> None:
    """Retrain at the bit-widths of a search, or go on with the retraining in ``out``; leaves results.json, checkpoints.

    Raises:
        UserError: if the search is not finished, the data is too small for the batches, or training diverges.
    """
    job.check()
    trained = stages.retrain(
        job,
        lambda: stages.fix_widths(job, stages.restore(job, _checkpoints(job, search_folder))),
        _checkpoints(job, out),
        log,
    )
    assert trained.plan is not None
    validation = evaluate(trained.model, job.data, "validation", job.run.device)
    if dist.get_rank() == 0:
        trained.plan.save(out / PLAN)
        _write_results(out, {"validation": validation})
    dist.barrier()


def emit(job: Job, retrained: Path, out: Path) -> None:
    """Pack the retrained model of a folder, check it against the retrained one, evaluate it, and save it.

    Raises:
        RuntimeError: if the packed model does not predict what the retrained one does.
    """
    trained = stages.restore(job, _checkpoints(job, retrained))
    emitted, test, sizes = stages.emit(job, trained)
    if dist.get_rank() == 0:
        metadata = {"result": {"test": test, **sizes}, "retrained": str(retrained.resolve())}
        save(emitted, out, plan=trained.plan, metadata=metadata)
        print(
            f"{out}: AUC {auc_text(test['auc'])}, {sizes['embedding_bytes']:,} bytes "
            f"({sizes['compression_ratio']:.1f}x)",
            flush=True,
        )
    dist.barrier()


def finished(folder: Path) -> bool:
    """Whether the search or retraining in a folder has come to its end."""
    return (folder / RESULTS).exists()


def check_artifact(folder: Path, retrained: Path) -> bool:
    """Whether a folder holds the packed model of a retraining, which appears complete or not at all; else it is free.

    Raises:
        UserError: if it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        document = json.loads((folder / "manifest.json").read_text())
        if document["metadata"]["retrained"] == str(retrained.resolve()):
            return True
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{folder} exists and holds no model packed from {retrained}: choose another folder")


def _checkpoints(job: Job, folder: Path) -> Checkpoints:
    return Checkpoints(folder / CHECKPOINTS, timeout=job.run.timeout)


def _write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Written last: a folder with results is finished."""
    with atomic_file(folder / RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
