"""What training with a cache took and counted."""

from collections.abc import Mapping

from torchrec_mpe.app.report.data import ReportData, unique
from torchrec_mpe.app.report.estimates import summarize
from torchrec_mpe.app.report.html_table import html_table
from torchrec_mpe.app.report.numerals import MISSING, bytes_with_error, decimal, in_bytes, with_error

_COUNTERS = (
    ("Batches", "", "num_calls"),
    ("Lookups", "", "num_requested_indices"),
    ("Distinct rows", "added up over batches", "num_unique_indices"),
    ("Misses", "distinct rows", "num_unique_misses"),
    ("Spilled", "of the misses", "num_conflict_unique_misses"),
    ("Evictions", "", "num_evictions"),
)


def cache_tables(report: ReportData) -> str:
    """Bytes in training by method, and counters by method and table of the first seed; empty without a cache."""
    rows = {method: [row for row in report.results if str(row["method"]) == method] for method in report.methods}
    first = {method: found[0] for method, found in rows.items() if found and "cache_statistics" in found[0]}
    if not first:
        return ""
    kinds = {method: row["training_bytes_by_kind"] for method, row in first.items()}
    return (
        "<h2>Caches</h2>\n<p>Everything that the rows take while they train, against fp32 with the state of row-wise "
        "Adagrad. The spill area is as large as it came to be.</p>\n"
        + _bytes_table(report, kinds)
        + "<p>What the caches counted over the whole training of the first seed. A row that is spilled found no slot "
        "in its set: many of them mean that the cache is small for the batch or, with LFU, that rows are colder than "
        "all that their set holds.</p>\n"
        + _counters_table({method: row["cache_statistics"] for method, row in first.items()})
    )


def _bytes_table(report: ReportData, by_kind: Mapping[str, Mapping[str, int]]) -> str:
    """Mean bytes per method, and those of each kind of the first seed."""
    kinds = unique(kind for sizes in by_kind.values() for kind in sizes)
    header = [("Method", ""), ("All", ""), ("Ratio", "fp32 / all"), ("Hit rate", "distinct rows")]
    header += [(kind.replace("_", " ").capitalize(), "") for kind in kinds]
    lines = []
    for one in summarize(report.results):
        if one.training_bytes is None or one.training_ratio is None:
            continue
        sizes = by_kind.get(one.method, {})
        lines.append(
            [
                one.method,
                bytes_with_error(one.training_bytes),
                f"{decimal(one.training_ratio.mean, 2)}\N{MULTIPLICATION SIGN}",
                MISSING if one.hit_rate is None else f"{with_error(one.hit_rate, 2, 100)}%",
                *(in_bytes(sizes[kind]) if kind in sizes else MISSING for kind in kinds),
            ]
        )
    return html_table(header, lines)


def _counters_table(methods: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """A line per method, batches counted once, and one per table."""
    header = [("Method and table", ""), *((title, unit) for title, unit, _ in _COUNTERS), ("Hit rate", "")]
    lines = []
    for method, tables in methods.items():
        total = {name: sum(counters[name] for counters in tables.values()) for _, _, name in _COUNTERS}
        total["num_calls"] = max((counters["num_calls"] for counters in tables.values()), default=0)
        for label, counters in [(method, total), *((f"{method}, {table}", c) for table, c in tables.items())]:
            distinct = counters["num_unique_indices"]
            rate = decimal(100 * (1 - counters["num_unique_misses"] / distinct), 2) + "%" if distinct else MISSING
            lines.append([label, *(f"{counters[name]:,}" for _, _, name in _COUNTERS), rate])
    return html_table(header, lines)
