"""Records of compress_accuracy.py: changes of AUC against fp32, paired by seed."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def changes(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By method: mean AUC, its mean change against fp32 of the same seed with its standard error, sizes and times."""
    fp32 = {record["seed"]: record for record in records if record["method"] == "fp32"}
    found: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(record["method"] for record in records):
        rows = [record for record in records if record["method"] == method]
        differences = [record["auc"] - fp32[record["seed"]]["auc"] for record in rows]
        found[method] = {
            "auc": statistics.fmean(record["auc"] for record in rows),
            "change": statistics.fmean(differences),
            "error": statistics.stdev(differences) / len(rows) ** 0.5 if len(rows) > 1 else float("nan"),
            **{k: statistics.fmean(record[k] for record in rows) for k in ("embedding_bytes", "compression_ratio")},
            "epochs": statistics.fmean(
                record["seconds_after_training"] / fp32[record["seed"]]["seconds"] for record in rows
            ),
        }
    return found


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The table, in Markdown; time is that of coding and distilling over that of training the fp32 model."""
    lines = ["| method | AUC | change | bytes | ratio | time |", "|---|---|---|---|---|---|"]
    for method, row in changes(records).items():
        change = "" if method == "fp32" else f"{row['change']:+.4f} ± {row['error']:.4f}"
        size = f"{row['embedding_bytes']:,.0f} | {row['compression_ratio']:.1f}x"
        time = "" if method == "fp32" else f"{row['epochs']:.2f}"
        lines.append(f"| {method} | {row['auc']:.4f} | {change} | {size} | {time} |")
    return "\n".join(lines)
