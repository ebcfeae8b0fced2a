"""The quantizing op alone: benchmarks/search_op.py."""

from collections.abc import Sequence

from result_pages.text import Figures, Record, machine, table


def figures(records: Sequence[Record]) -> Figures:
    """``table`` and ``machine``."""
    lines = [
        (
            record["case"].partition(",")[0],
            f"{int(record['case'].split()[-2]):,}",
            str(record["dim"]),
            record["rival"],
            f"{record['seconds'] * 1e3:.2f}",
            f"{record['rival_seconds'] * 1e3:.2f}",
            f"{record['ratio']:.2f}",
        )
        for record in records
    ]
    head = ("op", "rows", "D", "against", "ms", "its ms", "times as fast")
    return {"table": table(head, lines), "machine": machine(records[0])}
