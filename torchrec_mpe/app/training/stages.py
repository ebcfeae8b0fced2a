"""The stages of the pipeline: begin or search, retrain, emit. Every rank calls them, a single process too.

Where a stage has checkpoints it goes on from the newest, and the next stage starts from them; without, from the model.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.data.split import SPLITS
from torchrec_mpe.app.models import build_model, table_configs
from torchrec_mpe.app.training.cache_counters import (
    cache_statistics,
    cached_bytes,
    flush,
    fp32_training_bytes,
    stored_bytes,
)
from torchrec_mpe.app.training.compression import compress_trained
from torchrec_mpe.app.training.loop import Curve, evaluate, shard, train_phase
from torchrec_mpe.app.training.method import Method
from torchrec_mpe.app.training.phase_checkpoints import PhaseCheckpoints
from torchrec_mpe.app.training.settings import RunSettings, Settings
from torchrec_mpe.app.training.step_log import StepLog
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.from_frequencies import caches_from_frequencies
from torchrec_mpe.cache.statistics import CacheStatistics
from torchrec_mpe.distributed.checkpoint.checkpoint import Checkpoint
from torchrec_mpe.distributed.checkpoint.checkpoints import Checkpoints
from torchrec_mpe.distributed.phases import prepare_retrain_, prepare_search_, reset_rows_
from torchrec_mpe.errors import UserError
from torchrec_mpe.inference.emit import emit_inference_model
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.modules.embedding_bag_collection import Phase
from torchrec_mpe.modules.sampling import sample_precision
from torchrec_mpe.precision.plan import PrecisionPlan


@dataclass(frozen=True)
class Job:
    """What the stages work on.

    Attributes:
        method (Method): how to size the tables.
        data (PreparedDataset): training, validation and test rows.
        settings (Settings): what the result depends on.
        run (RunSettings): what it does not.
    """

    method: Method
    data: PreparedDataset
    settings: Settings
    run: RunSettings = field(default_factory=RunSettings)

    @cached_property
    def tables(self) -> list[EmbeddingBagConfig]:
        """Of the dataset's fields."""
        return table_configs(self.data, self.settings.dim)

    @cached_property
    def counts(self) -> dict[str, Tensor]:
        """How often each row of each table occurs in the training rows, int64 [num_embeddings]."""
        return {table.name: self.data.counts(table.feature_names[0]) for table in self.tables}

    def plan(self) -> PrecisionPlan | None:
        """See :meth:`Method.plan`."""
        return self.method.plan(self.counts, self.tables, self.settings.search_config)

    def check(self) -> None:
        """Find out before any training whether the data is large enough for the ranks and for the method.

        Raises:
            UserError: if it is not.
        """
        ranks, batch_size, data = dist.get_world_size(), self.settings.batch_size, self.data
        if not data.num_batches("train", batch_size, drop_last=True, world_size=ranks):
            raise UserError(
                f"{data.path} has {data.num_rows('train')} training rows, fewer than one batch of {batch_size} on "
                f"each of {ranks} ranks: use a smaller --batch-size or fewer ranks"
            )
        for split in ("validation", "test"):
            if data.num_rows(split) < ranks:
                raise UserError(
                    f"{data.path} has {data.num_rows(split)} {split} rows for {ranks} ranks: use fewer ranks"
                )
        for split in SPLITS:
            positives = data.manifest["splits"][split]["positives"]
            if positives in (0, 1):
                kind = "positive" if positives else "negative"
                raise UserError(
                    f"{data.path}: all {data.num_rows(split)} {split} rows are {kind}, "
                    "so that there is nothing to tell apart and no AUC: prepare more rows or with another --split-seed"
                )
        self.plan()


@dataclass
class Trained:
    """A sharded model between two phases.

    Attributes:
        model (DistributedModelParallel): (dense, sparse) -> logits.
        plan (Optional[PrecisionPlan]): its bit-widths, None if they are not fixed.
        phase (int): the phase that the model stands in, of ``resets + 1``.
        found (Optional[Checkpoint]): of this phase, which it was restored from.
        curves (dict[str, Curve]): of the phases trained here, by name.
        seconds (float): that training took, if it was whole.
    """

    model: DistributedModelParallel
    plan: PrecisionPlan | None
    phase: int
    found: Checkpoint | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    seconds: float = 0.0


def begin(job: Job) -> Trained:
    """A new model, its rows at their initial values."""
    method, plan = job.method, job.plan()
    cache = None
    if method.cache is not None:
        cache = caches_from_frequencies(job.counts, job.tables, replace(method.cache, seed=job.settings.seed))
    model = _model(job, cache)
    if method.searches:
        prepare_search_(model, job.counts, job.settings.search_config)
    elif plan is not None:
        prepare_retrain_(model, plan)
    sharded = shard(model, job.settings.batch_size, job.run)
    if plan is None and not method.searches:
        reset_rows_(sharded, job.settings.search_config.initialization)
    return Trained(sharded, plan, 0)


def search(job: Job, checkpoints: Checkpoints | None = None, log: StepLog | None = None) -> Trained:
    """Train the first phase of a method that searches, or go on with it.

    Raises:
        UserError: if training diverges.
    """
    trained = begin(job)
    trained.found = None if checkpoints is None else checkpoints.newest()
    _train(job, trained, checkpoints, log)
    return trained


def sample(job: Job, searched: Trained) -> PrecisionPlan:
    """The bit-widths that a search came to.

    Raises:
        UserError: if a probability is not a number.
    """
    try:
        return sample_precision(searched.model)
    except ValueError as error:
        raise UserError(f"{job.method.name}, seed {job.settings.seed}: {error}") from error


def fix_widths(job: Job, searched: Trained) -> Trained:
    """The model of a search at the bit-widths that it came to, its rows back at their initial values."""
    plan = sample(job, searched)
    prepare_retrain_(searched.model, plan)
    return Trained(searched.model, plan, 1, curves=searched.curves)


def retrain(
    job: Job, start: Callable[[], Trained], checkpoints: Checkpoints | None = None, log: StepLog | None = None
) -> Trained:
    """Train all phases that come after a search, or all of a method without one; or go on with them.

    Args:
        job (Job): what to train.
        start (Callable): makes the model that stands in the first of these phases, unless there is a checkpoint.
        checkpoints (Optional[Checkpoints]): where to save, and what to go on from.
        log (Optional[StepLog]): takes the loss of every step.

    Raises:
        UserError: if training diverges.
    """
    if checkpoints is None:
        trained = start()
    else:
        if checkpoints.newest() is None:
            new = start()
            place = {"phase": new.phase, "epoch": 0, "batch": 0}
            checkpoints.save(new.model, step=0, position=place, plan=new.plan)
            del new
            gc.collect()  # modules and their hooks refer to each other
        # Also without an interruption from the checkpoint: sharded as it will be after one.
        trained = restore(job, checkpoints, load=False)
    _train(job, trained, checkpoints, log)
    while trained.phase < job.settings.resets:
        reset = job.settings.search_config.initialization if trained.plan is None else trained.plan.initialization
        reset_rows_(trained.model, reset)
        trained.phase, trained.found = trained.phase + 1, None
        _train(job, trained, checkpoints, log)
    return trained


def restore(job: Job, checkpoints: Checkpoints, *, load: bool = True) -> Trained:
    """The model of the newest checkpoint; with ``load`` also its values, but for the state of optimizers.

    Raises:
        UserError: if there is no checkpoint.
    """
    found = checkpoints.newest()
    if found is None:
        raise UserError(f"{checkpoints.folder} holds no complete checkpoint, though the stage was finished")
    model = shard(found.prepare_(_model(job)), job.settings.batch_size, job.run)
    if load:
        checkpoints.load(model, None, found, optimizer_state=False)
    plan = found.plan() if found.phase is Phase.RETRAIN else None
    return Trained(model, plan, found.position["phase"], found)


def emit(job: Job, trained: Trained) -> tuple[nn.Module, dict[str, float], dict[str, Any]]:
    """What to serve: the packed model, which emission checks against the retrained one; else the trained model.

    Returns:
        nn.Module: with packed rows, coded or of fixed bit-widths, or the trained model, its caches flushed.
        Dict[str, float]: auc and logloss of the test rows.
        Dict[str, Any]: average_bits, embedding_bytes, fp32_bytes and compression_ratio, as stored; see
            :class:`~torchrec_mpe.app.training.pipeline.Outcome` for those of models that are not packed.

    Raises:
        RuntimeError: if packed and retrained embeddings differ by more than rounding.
        UserError: if the size of coded tables cannot be reached.
    """
    model: nn.Module = trained.model
    if job.method.kind == "coded":
        model = compress_trained(job.method, job.data, job.counts, trained.model, job.settings, job.run)
        sizes = _packed_sizes(model)
    elif trained.plan is None:
        sizes = _training_sizes(job, trained.model)
    else:
        model = emit_inference_model(model)
        sizes = {**_packed_sizes(model), "average_bits": round(trained.plan.average_bits, 6)}
    return model, evaluate(model, job.data, "test", job.run.device), sizes


def _model(job: Job, cache: Mapping[str, CacheConfig] | None = None) -> nn.Module:
    torch.manual_seed(job.settings.seed)
    return build_model(job.settings.model, job.tables, len(job.data.dense_names), device=job.run.device, cache=cache)


def _train(job: Job, trained: Trained, checkpoints: Checkpoints | None, log: StepLog | None) -> None:
    """Train the phase that the model stands in."""
    settings, run, phase = job.settings, job.run, trained.phase
    searching = job.method.searches and phase == 0
    kind = "train" if trained.plan is None else "retrain"
    saved = None
    if checkpoints is None:
        name = f"{'search' if searching else f'{kind} {phase + 1}'} of {settings.resets + 1}"
        name = f"{job.method.name} seed {settings.seed}: {name}"
    else:
        name = "search" if searching else f"{kind} {phase} of {settings.resets}"
        ranks = dist.get_world_size()
        steps = settings.epochs * job.data.num_batches("train", settings.batch_size, drop_last=True, world_size=ranks)
        saved = PhaseCheckpoints(
            checkpoints,
            phase,
            0 if searching else 1 + (phase - 1) * steps,  # the start of retraining is checkpoint 0
            run.checkpoint_every,
            found=trained.found,
            counts=job.counts if searching else None,
            plan=trained.plan,
            asynchronous=run.checkpoint_asynchronously,
        )
    trained.curves["search" if searching else f"{kind} {phase + 1}"] = train_phase(
        trained.model,
        job.data,
        settings,
        phase,
        phase=name,
        penalize_bits=searching,
        progress=run.progress,
        checkpoints=saved,
        step_log=log,
    )
    if checkpoints is not None:
        checkpoints.wait()


def _sizes(average_bits: float, embedding_bytes: int, fp32_bytes: int) -> dict[str, Any]:
    return {
        "average_bits": average_bits,
        "embedding_bytes": embedding_bytes,
        "fp32_bytes": fp32_bytes,
        "compression_ratio": round(fp32_bytes / embedding_bytes, 3),
    }


def _packed_sizes(model: nn.Module) -> dict[str, Any]:
    """The sizes of a packed model; bits of an element are those of the rows alone."""
    reports = [m.size_report() for m in model.modules() if isinstance(m, PackedEmbeddingBagCollection)]
    packed, fp32 = sum(r.total for r in reports), sum(r.fp32_bytes for r in reports)
    return _sizes(round(32 * sum(r.payload for r in reports) / fp32, 6), packed, fp32)


def _training_sizes(job: Job, model: DistributedModelParallel) -> dict[str, Any]:
    """The sizes of a model that is not packed, with those in training; flushes its caches."""
    fp32 = sum(4 * table.num_embeddings * table.embedding_dim for table in job.tables)
    training = fp32_training_bytes(job.tables)
    if job.method.cache is None:
        return {**_sizes(32.0, fp32, fp32), "training_bytes": training, "fp32_training_bytes": training}
    statistics = cache_statistics(model)
    by_kind = cached_bytes(model)
    cached_auc = evaluate(model, job.data, "test", job.run.device)["auc"]
    flush(model)  # what is evaluated from here on is what is stored
    return {
        **_sizes(float(job.method.cache.bits), stored_bytes(model), fp32),
        "training_bytes": sum(by_kind.values()),
        "fp32_training_bytes": training,
        "training_bytes_by_kind": by_kind,
        "hit_rate": round(sum(statistics.values(), CacheStatistics()).hit_rate, 6),
        "cache_statistics": {table: asdict(counters) for table, counters in statistics.items()},
        "auc_before_flush": cached_auc,
    }
