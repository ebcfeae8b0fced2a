"""The whole pipeline in one go, from a fresh model to an evaluated one that can be served."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchrec_mpe.app.training.loop import Curve
from torchrec_mpe.app.training.stages import Job, Trained, begin, emit, fix_widths, retrain, search
from torchrec_mpe.modules.penalty import search_quantizers
from torchrec_mpe.precision.plan import PrecisionPlan


@dataclass
class Outcome:
    """What one method came to with one seed.

    Attributes:
        record (dict[str, Any]): method, seed, auc, logloss (test rows), average_bits, embedding_bytes, fp32_bytes,
            compression_ratio, seconds and, of them, seconds_after_training. "fp32" and "cache" have training_bytes and
            fp32_training_bytes, of all that rows take while they train, optimizer state included; "cache" also
            training_bytes_by_kind, hit_rate, cache_statistics (by table) and auc_before_flush.
        curves (Mapping[str, Curve]): by phase.
        plan (Optional[PrecisionPlan]): None for "fp32", "cache" and "coded".
        probabilities (Optional[Mapping]): per table, bounds in the order of frequency and [groups, candidates], of
            "mpe".
        model (nn.Module): the emitted model with packed rows, or the trained one for "fp32" and "cache".
        trained (Optional[Trained]): the trained model that it was made from, until it is let go.
    """

    record: dict[str, Any]
    curves: Mapping[str, Curve]
    plan: PrecisionPlan | None
    probabilities: Mapping[str, tuple[tuple[int, ...], Tensor]] | None
    model: nn.Module
    trained: Trained | None


def run_pipeline(job: Job, teacher: Trained | None = None) -> Outcome:
    """Train, emit and evaluate one method; the process group must be initialized.

    Args:
        job (Job): what to do.
        teacher (Optional[Trained]): the fp32 model of the same settings, from its own outcome, which a method of coded
            tables then does not train once more; it stays as it is.

    Raises:
        UserError: if the data or the method's size do not fit, or training diverges.
        RuntimeError: if the emitted model does not predict what the retrained one does.
    """
    job.check()
    started = time.perf_counter()
    probabilities = None
    if teacher is not None:
        trained = teacher
    elif job.method.searches:
        trained = search(job)
        probabilities = _probabilities(trained.model)
        trained = fix_widths(job, trained)
    else:
        trained = begin(job)
    if teacher is None:
        trained = retrain(job, lambda: trained)
        trained.seconds = time.perf_counter() - started
        started = time.perf_counter()
    model, test, sizes = emit(job, trained)
    record = {
        "method": job.method.name,
        "seed": job.settings.seed,
        **test,
        **sizes,
        "seconds": round(trained.seconds + time.perf_counter() - started, 2),
        "seconds_after_training": round(time.perf_counter() - started, 2),
    }
    curves = trained.curves if teacher is None else {}
    return Outcome(record, curves, trained.plan, probabilities, model, trained)


def _probabilities(model: nn.Module) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Per table, its groups' bounds in the order of frequency and their probabilities."""
    found: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for quantizer in search_quantizers(model):
        probabilities = quantizer.probabilities().detach().cpu()
        for table, groups in quantizer.groups.groups.items():
            found[table] = (quantizer.groups.bounds[table], probabilities[list(groups)])
    return found
