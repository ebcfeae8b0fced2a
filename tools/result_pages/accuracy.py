"""AUC against bytes: benchmarks/accuracy.py."""

from collections.abc import Sequence

from accuracy_summary import BASE, summarize, table

from result_pages.text import Figures, Record, machine


def figures(records: Sequence[Record]) -> Figures:
    """``table``, ``machine``, ``seeds``, and of a method ``LABEL: auc``, ``: change``, ``: loss`` and ``: ratio``."""
    summary = summarize(records)
    found = {"table": table(summary), "machine": machine(records[0])}
    found["seeds"] = str(len({record["seed"] for record in records}))
    for label, row in summary.items():
        change = row["auc"] - summary[BASE]["auc"]
        found[f"{label}: change"], found[f"{label}: loss"] = f"{change:+.4f}", f"{-change:.4f}"
        found[f"{label}: auc"], found[f"{label}: ratio"] = f"{row['auc']:.4f}", f"{row['compression_ratio']:.3g}"
        for other, its in summary.items():
            found[f"{label} over {other}"] = f"{row['auc'] - its['auc']:.4f}"
            found[f"bytes of {label} over {other}"] = f"{row['embedding_bytes'] / its['embedding_bytes']:.1f}"
    return found
