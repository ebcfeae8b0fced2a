"""AUC of coded tables against bytes: benchmarks/compress_accuracy.py."""

from collections.abc import Sequence

from compress_summary import changes, table

from result_pages.text import Figures, Record, machine


def figures(records: Sequence[Record]) -> Figures:
    """``table``, ``machine``, ``seeds``, and of a method ``METHOD: change``, ``: error`` and ``: ratio``."""
    found = {"table": table(records), "machine": machine(records[0])}
    found["seeds"] = str(len({record["seed"] for record in records}))
    for method, row in changes(records).items():
        found[f"{method}: change"], found[f"{method}: error"] = f"{row['change']:+.4f}", f"{row['error']:.4f}"
        found[f"{method}: ratio"], found[f"{method}: time"] = f"{row['compression_ratio']:.0f}", f"{row['epochs']:.2f}"
    return found
