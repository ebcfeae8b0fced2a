"""What a report shows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torchrec_mpe.coding.code_tables import TableSummary
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.layout import TableLayout

RESULT_KEYS = (
    "method",
    "seed",
    "auc",
    "logloss",
    "average_bits",
    "embedding_bytes",
    "fp32_bytes",
    "compression_ratio",
    "seconds",
)
CURVE_KEYS = ("method", "seed", "phase", "steps", "loss", "validation")


@dataclass(frozen=True)
class CodedTable:
    """A coded table: how its rows lie, what became of them, and all bytes that it takes."""

    layout: TableLayout
    summary: TableSummary
    bytes: int


@dataclass(frozen=True)
class ReportData:
    """Everything that :func:`~torchrec_mpe.app.report.write.write_report` shows; an empty part is left out of the page.

    Attributes:
        title (str): the page's heading.
        results (Sequence[Mapping[str, Any]]): a row per method and seed with method, seed, auc, logloss, average_bits,
            embedding_bytes (as stored: packed rows, directories and scales), fp32_bytes, compression_ratio, seconds.
            Methods with a cache also have training_bytes, training_bytes_by_kind, fp32_training_bytes, hit_rate and
            cache_statistics (table -> counters by name).
        curves (Sequence[Mapping[str, Any]]): a row per method, seed and phase ("train", "search", "retrain 1", ...)
            with steps (list[int]), loss (list[float], training log loss averaged over windows) and validation
            (list of {"step", "auc"}). Methods with a cache also have caches (list[dict[str, CacheStatistics]]): what
            each table's cache counted in the windows that end at the steps.
        plans (Mapping[str, Mapping[str, TableBitWidths]]): method -> table -> bit-widths.
        codings (Mapping[str, Mapping[str, CodedTable]]): method -> table -> what coding made of it.
        counts (Mapping[str, Tensor]): table -> int64 [num_embeddings], training frequencies by row id.
        probabilities (Mapping[str, Mapping[str, tuple[tuple[int, ...], Tensor]]]): method -> table -> the bounds
            of its k groups in the order of frequency (k + 1 numbers) and the probability of each candidate bit-width,
            [k, m].
        candidate_bits (tuple[int, ...]): the m candidate bit-widths.
        environment (Mapping[str, str]): versions, CPU, command line.
        data (Mapping[str, str | int | float]): rows, fields, split.

    Raises:
        ValueError: if a row lacks a key, or a tensor does not fit its table.
    """

    title: str
    results: Sequence[Mapping[str, Any]]
    curves: Sequence[Mapping[str, Any]] = ()
    plans: Mapping[str, Mapping[str, TableBitWidths]] = field(default_factory=dict)
    codings: Mapping[str, Mapping[str, CodedTable]] = field(default_factory=dict)
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    probabilities: Mapping[str, Mapping[str, tuple[tuple[int, ...], Tensor]]] = field(default_factory=dict)
    candidate_bits: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require("results", self.results, RESULT_KEYS)
        _require("curves", self.curves, CURVE_KEYS)
        for curve in self.curves:
            if len(curve["steps"]) != len(curve["loss"]):
                raise ValueError(
                    f"a curve of {curve['method']} has {len(curve['steps'])} steps, {len(curve['loss'])} losses"
                )
            if curve.get("caches") and len(curve["steps"]) != len(curve["caches"]):
                raise ValueError(
                    f"a curve of {curve['method']} has {len(curve['steps'])} steps, {len(curve['caches'])} caches"
                )
        for method, tables in self.plans.items():
            for table, widths in tables.items():
                if table in self.counts and self.counts[table].shape != (widths.num_embeddings,):
                    raise ValueError(
                        f"{method} has {widths.num_embeddings} rows in {table}, counts have {len(self.counts[table])}"
                    )
        for method, groups in self.probabilities.items():
            for table, (bounds, probabilities) in groups.items():
                if probabilities.shape != (len(bounds) - 1, len(self.candidate_bits)):
                    wanted = [len(bounds) - 1, len(self.candidate_bits)]
                    raise ValueError(
                        f"probabilities of {method} in {table} must be {wanted}, got {list(probabilities.shape)}"
                    )

    @property
    def methods(self) -> list[str]:
        """Every method that some part mentions, in order of first mention."""
        rows = [str(row["method"]) for part in (self.results, self.curves) for row in part]
        return unique([*rows, *self.plans, *self.codings, *self.probabilities])


def _require(part: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Raise ValueError unless every row has every key."""
    for number, row in enumerate(rows):
        if lacking := [key for key in keys if key not in row]:
            raise ValueError(f"{part}[{number}] lacks {', '.join(lacking)}")


def unique(items: Iterable[str]) -> list[str]:
    """``items`` without repeats, in order of first occurrence."""
    return list(dict.fromkeys(items))
