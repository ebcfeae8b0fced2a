"""What a step of a large model sends: benchmarks/communication.py."""

from collections.abc import Sequence

from result_pages.text import Figures, Record, machine, table

_PREFIX = "1 TB on 64 ranks: "
_SHARDINGS = ("table_wise", "row_wise", "table_row_wise")


def figures(records: Sequence[Record]) -> Figures:
    """``terabyte``, ``machine``, and ``added``, what the quantizers add to a table-wise step, in percent."""
    sent = {r["case"].removeprefix(_PREFIX): r for r in records if r["case"].startswith(_PREFIX)}
    checked = [r for r in records if "counted" in r]
    if not all(r["counted"] == r["expected"] for r in checked):
        raise ValueError("communication: what was counted on ranks differs from the formulas")

    def megabytes(phase: str, key: str = "sent") -> list[str]:
        sizes = [sent[f"{phase} {sharding}"][key] / 1e6 for sharding in _SHARDINGS]
        return [f"{size:,.2f} MB" if size < 1 else f"{size:,.0f} MB" for size in sizes]

    lines = [
        ("plain", *megabytes("plain")),
        ("search", *megabytes("search")),
        ("of which quantizers", *megabytes("search", "quantizers")),
        ("packed, forward", *megabytes("packed")),
    ]
    search = sent["search table_wise"]
    return {
        "terabyte": table(("", *(sharding.replace("_", "-") for sharding in _SHARDINGS)), lines),
        "machine": machine(records[0]),
        "added": f"{search['quantizers'] / (search['sent'] - search['quantizers']):.2%}",
    }
