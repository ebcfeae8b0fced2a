"""The table that a run prints."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchrec_mpe.app.report.estimates import summarize
from torchrec_mpe.app.report.numerals import auc_text
from torchrec_mpe.files.text_table import text_table


def result_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One line a method: means over seeds, and the standard error of the AUC where there are several.

    Args:
        records (Sequence[Mapping[str, Any]]): results with method, seed, auc, logloss, average_bits, embedding_bytes,
            compression_ratio and seconds; perhaps training_bytes, fp32_training_bytes and hit_rate, which are shown,
            with a sentence on what the bytes are, if some method has a cache.
    """
    rows = summarize(records)
    cached = any(row.hit_rate is not None for row in rows)
    lines = [["method", "AUC", "vs fp32", "log loss", "avg bits", "bytes", "ratio", "seconds"]]
    if cached:
        lines[0] += ["training bytes", "ratio", "hit rate"]
    for row in rows:
        error = "" if row.auc.error is None or math.isnan(row.auc.mean) else f" ± {row.auc.error:.4f}"
        lines.append(
            [
                row.method,
                f"{auc_text(row.auc.mean)}{error}",
                "" if row.delta is None or math.isnan(row.delta.mean) else f"{row.delta.mean:+.4f}",
                f"{row.logloss.mean:.4f}",
                f"{row.average_bits.mean:.3f}",
                f"{row.embedding_bytes.mean:,.0f}",
                f"{row.compression_ratio.mean:.1f}x",
                f"{row.seconds.mean:.0f}",
            ]
        )
        if cached:
            lines[-1] += [
                "" if row.training_bytes is None else f"{row.training_bytes.mean:,.0f}",
                "" if row.training_ratio is None else f"{row.training_ratio.mean:.1f}x",
                "" if row.hit_rate is None else f"{row.hit_rate.mean:.1%}",
            ]
    return text_table(lines) + (f"\n\n{BYTES_IN_TRAINING}" if cached else "")


BYTES_IN_TRAINING = (
    "bytes: the tables as stored for inference, those of a cache flushed and without optimizer state. training bytes: "
    "all that the rows take while they train, optimizer state, cache, spill area and directory included; the ratio is "
    "to fp32 with row-wise Adagrad."
)
