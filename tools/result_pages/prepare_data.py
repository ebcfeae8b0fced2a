"""Preparing a log: benchmarks/prepare_data.py."""

from result_pages.text import Figures, Record, machine, table


def figures(record: Record) -> Figures:
    """``table``, ``machine``, and ``rows a second`` of the largest log."""
    measured, whole = record["measured"], record["extrapolated"]
    lines = [
        (
            f"{row['rows']:,}" + (" (extrapolated)" if row is whole else ""),
            f"{row['values']:,.0f}",
            f"{row['seconds']:,.0f}",
            f"{row['peak_bytes'] / 1e9:.1f}",
        )
        for row in (*measured, whole)
    ]
    largest = measured[-1]
    return {
        "table": table(("rows", "different ids", "seconds", "peak GB"), lines),
        "machine": machine(record["machine"]),
        "rows a second": f"{largest['rows'] / largest['seconds']:,.0f}",
    }
