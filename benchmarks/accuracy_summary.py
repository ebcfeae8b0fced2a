"""Records of accuracy.py by method, and their table."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BASE = "fp32, 3 resets"
"""The method that the others' AUC is compared with: fp32 under the schedule of the search."""


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard error of the AUC, and mean sizes, per label."""
    labels = dict.fromkeys(r["label"] for r in records)
    summary: dict[str, dict[str, float]] = {}
    for label in labels:
        rows = [r for r in records if r["label"] == label]
        auc = [r["auc"] for r in rows]
        summary[label] = {
            "auc": statistics.fmean(auc),
            "error": statistics.stdev(auc) / len(auc) ** 0.5 if len(auc) > 1 else float("nan"),
            **{
                k: statistics.fmean(r[k] for r in rows)
                for k in ("average_bits", "embedding_bytes", "compression_ratio", "seconds")
            },
        }
    return summary


def table(summary: Mapping[str, Mapping[str, float]]) -> str:
    """The table, in Markdown."""
    lines = [f"| method | AUC | vs {BASE} | average bits | bytes | ratio |", "|---|---|---|---|---|---|"]
    base = summary[BASE]["auc"]
    for label, row in summary.items():
        size = f"{row['average_bits']:.2f} | {row['embedding_bytes']:,.0f} | {row['compression_ratio']:.1f}x"
        lines.append(f"| {label} | {row['auc']:.4f} ± {row['error']:.4f} | {row['auc'] - base:+.4f} | {size} |")
    return "\n".join(lines)
