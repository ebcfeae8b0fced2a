"""The table that a run prints."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torchrec_mpe.text_table import text_table


def result_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One line a method: means over seeds, and the standard error of the AUC where there are several.

    Args:
        records (Sequence[Mapping[str, Any]]): results with method, seed, auc, logloss, average_bits, embedding_bytes,
            compression_ratio and seconds.
    """
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_method.setdefault(record["method"], []).append(record)
    baseline = by_method.get("fp32")
    base_auc = statistics.fmean(r["auc"] for r in baseline) if baseline else None
    lines = [["method", "AUC", "vs fp32", "log loss", "avg bits", "bytes", "ratio", "seconds"]]
    for method, rows in by_method.items():
        auc = [r["auc"] for r in rows]
        mean = statistics.fmean(auc)
        error = f" ± {statistics.stdev(auc) / len(auc) ** 0.5:.4f}" if len(auc) > 1 else ""
        lines.append(
            [
                method,
                f"{mean:.4f}{error}",
                "" if base_auc is None else f"{mean - base_auc:+.4f}",
                f"{statistics.fmean(r['logloss'] for r in rows):.4f}",
                f"{statistics.fmean(r['average_bits'] for r in rows):.3f}",
                f"{statistics.fmean(r['embedding_bytes'] for r in rows):,.0f}",
                f"{statistics.fmean(r['compression_ratio'] for r in rows):.1f}x",
                f"{statistics.fmean(r['seconds'] for r in rows):.0f}",
            ]
        )
    return text_table(lines)
