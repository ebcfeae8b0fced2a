"""The methods that `torchrec-mpe run` compares, each from a fresh model to an evaluated one."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.models import ModelKind, build_model, table_configs
from torchrec_mpe.app.training.cache_counters import (
    cache_statistics,
    cached_bytes,
    flush,
    fp32_training_bytes,
    stored_bytes,
)
from torchrec_mpe.app.training.loop import Curve, Hyperparameters, evaluate, shard, train_phase
from torchrec_mpe.cache.config import CacheConfig, parse_cache_config
from torchrec_mpe.cache.from_frequencies import caches_from_frequencies
from torchrec_mpe.cache.statistics import CacheStatistics
from torchrec_mpe.distributed.phases import prepare_retrain_, prepare_search_, reset_rows_
from torchrec_mpe.errors import UserError
from torchrec_mpe.inference.emit import emit_inference_model
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.modules.penalty import search_quantizers
from torchrec_mpe.modules.sampling import sample_precision
from torchrec_mpe.modules.search_config import SearchConfig
from torchrec_mpe.precision.from_frequencies import cut_precision, precision_from_frequencies, uniform_precision
from torchrec_mpe.precision.plan import PrecisionPlan
from torchrec_mpe.precision.row_initialization import RowInitialization


@dataclass(frozen=True)
class Method:
    """One way to size embedding tables.

    Attributes:
        name (str): as given on the command line, "fp32", "cache:int8:0.05", "uniform:6", "cut:4:0.1", "rule:60" or
            "mpe".
        kind (str): the part before the first colon.
        numbers (tuple[float, ...]): the parts after it, but of "cache".
        cache (Optional[CacheConfig]): of "cache".
    """

    name: str
    kind: str
    numbers: tuple[float, ...]
    cache: CacheConfig | None = None

    @classmethod
    def parse(cls, name: str) -> "Method":
        """Read a method's name.

        Raises:
            UserError: if it is none of the known forms.
        """
        kind, *rest = name.split(":")
        if kind == "cache":
            try:
                return cls(name, kind, (), parse_cache_config(name.partition(":")[2]))
            except ValueError as error:
                raise UserError(
                    f"method {name!r} is unknown: use cache:int8:FRACTION or cache:int4:FRACTION, FRACTION of the rows "
                    "above 0 and at most 1, with :lru or :lfu after it or without"
                ) from error
        forms = {"fp32": 0, "uniform": 1, "cut": 2, "rule": 1, "mpe": 0}
        try:
            numbers = tuple(float(part) for part in rest)
        except ValueError:
            numbers = ()
        if kind not in forms or len(rest) != forms[kind] or len(numbers) != len(rest):
            raise UserError(
                f"method {name!r} is unknown: use fp32, cache:int8:FRACTION, cache:int4:FRACTION, uniform:BITS, "
                "cut:BITS:FRACTION, rule:RATIO or mpe"
            )
        if kind in ("uniform", "cut") and numbers[0] not in range(1, 9):
            raise UserError(f"method {name!r} needs a bit-width from 1 to 8")
        if kind == "cut" and not 0 < numbers[1] <= 1:
            raise UserError(f"method {name!r} needs a fraction of rows above 0 and at most 1")
        if kind == "rule" and not 1 < numbers[0] < float("inf"):
            raise UserError(f"method {name!r} needs a compression ratio above 1")
        return cls(name, kind, numbers)


@dataclass(frozen=True)
class Job:
    """Settings that all methods of a run share.

    Attributes:
        model (str): "dlrm" or "dnn".
        embedding_dim (int): D.
        epochs (int): passes over the training rows in each phase.
        resets (int): how often the rows go back to their initial values; a run has ``resets + 1`` phases, the first of
            "mpe" being the search.
        search (SearchConfig): of "mpe".
        hyperparameters (Hyperparameters): batch size and learning rates.
        device (torch.device): where to train.
        progress (bool): show progress bars.
    """

    model: ModelKind = "dnn"
    embedding_dim: int = 16
    epochs: int = 1
    resets: int = 3
    search: SearchConfig = field(default_factory=SearchConfig)
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: bool = True


@dataclass
class Outcome:
    """What one method came to with one seed.

    Attributes:
        record (dict[str, Any]): method, seed, auc, logloss (test rows), average_bits, embedding_bytes, fp32_bytes,
            compression_ratio and seconds. "fp32" and "cache" have training_bytes and fp32_training_bytes, of all that
            rows take while they train, optimizer state included; "cache" also training_bytes_by_kind, hit_rate,
            cache_statistics (by table) and auc_before_flush.
        curves (list[Curve]): one a phase.
        plan (Optional[PrecisionPlan]): None for "fp32" and "cache".
        probabilities (Optional[Mapping]): per table, rank bounds and [groups, candidates], of "mpe".
        model (nn.Module): the emitted model with packed rows, or the trained one for "fp32" and "cache".
    """

    record: dict[str, Any]
    curves: list[Curve]
    plan: PrecisionPlan | None
    probabilities: Mapping[str, tuple[tuple[int, ...], Tensor]] | None
    model: nn.Module


def run_method(method: Method, data: PreparedDataset, job: Job, seed: int) -> Outcome:
    """Train, emit and evaluate one method.

    Args:
        method (Method): which.
        data (PreparedDataset): training, validation and test rows.
        job (Job): settings; its process group must be initialized.
        seed (int): of the initial rows, the dense network and the rows' order.

    Raises:
        UserError: if the method's size cannot be reached on this data, training diverges, or "mpe" has no reset.
        RuntimeError: if the emitted model does not predict what the retrained one does.
    """
    if method.kind == "mpe" and job.resets == 0:
        raise UserError("method mpe needs at least one reset: the search is the first phase, retraining the others")
    started = time.perf_counter()
    torch.manual_seed(seed)
    initialization = RowInitialization(seed, job.search.initialization.std)
    tables, counts = tables_and_counts(data, job.embedding_dim)
    cache = None
    if method.cache is not None:
        cache = caches_from_frequencies(counts, tables, replace(method.cache, seed=seed))
    model = build_model(job.model, tables, len(data.dense_names), device=job.device, cache=cache)
    plan: PrecisionPlan | None = None
    if method.kind == "mpe":
        prepare_search_(model, counts, replace(job.search, initialization=initialization))
    elif method.kind not in ("fp32", "cache"):
        plan = _plan(method, tables, counts, initialization, job.search)
        prepare_retrain_(model, plan)
    dmp = shard(model, job.hyperparameters, job.device)
    if plan is None and method.kind != "mpe":
        reset_rows_(dmp, initialization)
    curves: list[Curve] = []
    probabilities = None
    for phase in range(job.resets + 1):
        searching = method.kind == "mpe" and phase == 0
        if phase == 1 and method.kind == "mpe":
            probabilities = _probabilities(dmp)
            try:
                plan = sample_precision(dmp)
            except ValueError as error:
                raise UserError(f"{method.name}, seed {seed}: {error}") from error
            prepare_retrain_(dmp, plan)
        elif phase > 0:
            reset_rows_(dmp, initialization)
        name = "search" if searching else f"{'retrain' if plan is not None else 'train'} {phase + 1}"
        curve = train_phase(
            dmp,
            data,
            job.hyperparameters,
            phase=f"{method.name} seed {seed}: {name} of {job.resets + 1}",
            epochs=job.epochs,
            seed=seed * 100 + phase,
            penalize_bits=searching,
            progress=job.progress,
        )
        curve.phase = name
        curves.append(curve)
    emitted, sizes = _finish(method, dmp, plan, tables, data, job)
    record = {
        "method": method.name,
        "seed": seed,
        **evaluate(emitted, data, "test", job.device),
        **sizes,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return Outcome(record, curves, plan, probabilities, emitted)


def tables_and_counts(data: PreparedDataset, dim: int) -> tuple[list[EmbeddingBagConfig], dict[str, Tensor]]:
    """The tables of a dataset's fields, and how often each of their rows occurs in the training rows."""
    tables = table_configs(data, dim)
    return tables, {table.name: data.counts(table.feature_names[0]) for table in tables}


def check_fit(method: Method, data: PreparedDataset, job: Job) -> None:
    """Find out before any training whether a method without a search can reach its size on this data.

    Raises:
        UserError: if it cannot.
    """
    if method.kind not in ("fp32", "cache", "mpe"):
        tables, counts = tables_and_counts(data, job.embedding_dim)
        _plan(method, tables, counts, job.search.initialization, job.search)


def _plan(
    method: Method,
    tables: list[EmbeddingBagConfig],
    counts: Mapping[str, Tensor],
    initialization: RowInitialization,
    search: SearchConfig,
) -> PrecisionPlan:
    if method.kind == "uniform":
        return uniform_precision(tables, int(method.numbers[0]), initialization=initialization)
    try:
        if method.kind == "cut":
            bits, fraction = method.numbers
            return cut_precision(
                counts, tables, int(bits), fraction, initialization=initialization, zero_row=search.zero_row
            )
        return precision_from_frequencies(
            counts, tables, ratio=method.numbers[0], initialization=initialization, zero_row=search.zero_row
        )
    except ValueError as error:
        raise UserError(f"method {method.name} does not fit this data: {error}") from error


def _probabilities(model: nn.Module) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Per table, rank bounds and the groups' probabilities."""
    found: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for quantizer in search_quantizers(model):
        probabilities = quantizer.probabilities().detach().cpu()
        for table, groups in quantizer.groups.groups.items():
            found[table] = (quantizer.groups.bounds[table], probabilities[list(groups)])
    return found


def _finish(
    method: Method,
    dmp: DistributedModelParallel,
    plan: PrecisionPlan | None,
    tables: list[EmbeddingBagConfig],
    data: PreparedDataset,
    job: Job,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model to serve, and its sizes as stored."""
    if plan is not None:
        return emit_with_sizes(dmp, plan)
    fp32_bytes = sum(4 * table.num_embeddings * table.embedding_dim for table in tables)
    sizes = {"average_bits": 32.0, "embedding_bytes": fp32_bytes, "fp32_bytes": fp32_bytes, "compression_ratio": 1.0}
    sizes["training_bytes"] = sizes["fp32_training_bytes"] = fp32_training_bytes(tables)
    if method.cache is None:
        return dmp, sizes
    statistics = cache_statistics(dmp)
    by_kind = cached_bytes(dmp)
    cached_auc = evaluate(dmp, data, "test", job.device)["auc"]
    flush(dmp)  # what is evaluated from here on is what is stored
    stored = stored_bytes(dmp)
    return dmp, {
        **sizes,
        "average_bits": float(method.cache.bits),
        "embedding_bytes": stored,
        "compression_ratio": round(fp32_bytes / stored, 3),
        "training_bytes": sum(by_kind.values()),
        "training_bytes_by_kind": by_kind,
        "hit_rate": round(sum(statistics.values(), CacheStatistics()).hit_rate, 6),
        "cache_statistics": {table: asdict(counters) for table, counters in statistics.items()},
        "auc_before_flush": cached_auc,
    }


def emit_with_sizes(dmp: DistributedModelParallel, plan: PrecisionPlan) -> tuple[nn.Module, dict[str, Any]]:
    """Emit a retrained model, which checks itself against it.

    Returns:
        nn.Module: with packed rows.
        Dict[str, Any]: average_bits, embedding_bytes, fp32_bytes and compression_ratio, as stored.

    Raises:
        RuntimeError: if packed and retrained embeddings differ by more than rounding.
    """
    emitted = emit_inference_model(dmp)
    reports = [m.size_report() for m in emitted.modules() if isinstance(m, PackedEmbeddingBagCollection)]
    return emitted, {
        "average_bits": round(plan.average_bits, 6),
        "embedding_bytes": sum(r.total for r in reports),
        "fp32_bytes": sum(r.fp32_bytes for r in reports),
        "compression_ratio": round(sum(r.fp32_bytes for r in reports) / sum(r.total for r in reports), 3),
    }
