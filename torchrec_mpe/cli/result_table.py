"""The table that a run prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from torchrec_mpe.report.estimates import summarize
from torchrec_mpe.text_table import text_table


def result_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One line a method: means over seeds, and the standard error of the AUC where there are several.

    Args:
        records (Sequence[Mapping[str, Any]]): results with method, seed, auc, logloss, average_bits, embedding_bytes,
            compression_ratio and seconds.
    """
    lines = [["method", "AUC", "vs fp32", "log loss", "avg bits", "bytes", "ratio", "seconds"]]
    for row in summarize(records):
        error = "" if row.auc.error is None else f" ± {row.auc.error:.4f}"
        lines.append(
            [
                row.method,
                f"{row.auc.mean:.4f}{error}",
                "" if row.delta is None else f"{row.delta.mean:+.4f}",
                f"{row.logloss.mean:.4f}",
                f"{row.average_bits.mean:.3f}",
                f"{row.embedding_bytes.mean:,.0f}",
                f"{row.compression_ratio.mean:.1f}x",
                f"{row.seconds.mean:.0f}",
            ]
        )
    return text_table(lines)
