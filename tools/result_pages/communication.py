"""What a step of a large model sends: benchmarks/communication.py."""

from collections.abc import Sequence

from result_pages.text import Figures, Record, machine, table

_PREFIX = "1 TB on 64 ranks: "
_SHARDINGS = ("table_wise", "row_wise", "table_row_wise")


def figures(records: Sequence[Record]) -> Figures:
    """``terabyte``, ``machine``, MB by case, and ``added``, what quantizers add to a table-wise step, in percent."""
    sent = {r["case"].removeprefix(_PREFIX): r for r in records if r["case"].startswith(_PREFIX)}
    checked = [r for r in records if "counted" in r]
    if not all(r["counted"] == r["expected"] for r in checked):
        raise ValueError("communication: what was counted on ranks differs from the formulas")

    def megabytes(case: str, key: str = "sent") -> str:
        size = sent[case][key] / 1e6
        return f"{size:,.2f} MB" if size < 1 else f"{size:,.0f} MB"

    def line(what: str, phase: str, key: str = "sent") -> tuple[str, ...]:
        return (what, *(megabytes(f"{phase} {sharding}", key) for sharding in _SHARDINGS))

    lines = [
        line("plain", "plain"),
        line("search", "search"),
        line("of which quantizers", "search", "quantizers"),
        line("packed, forward", "packed"),
    ]
    search = sent["search table_wise"]
    return {
        **{case: megabytes(case) for case in sent},
        "row_wise over table_wise": f"{sent['plain row_wise']['sent'] / sent['plain table_wise']['sent']:.0f}",
        "terabyte": table(("", *(sharding.replace("_", "-") for sharding in _SHARDINGS)), lines),
        "machine": machine(records[0]),
        "added": f"{search['quantizers'] / (search['sent'] - search['quantizers']):.2%}",
    }
