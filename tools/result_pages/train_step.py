"""A whole training step against the fp32 step: benchmarks/train_step.py."""

import re
from collections.abc import Sequence

from result_pages.text import Figures, Record, machine, span, table


def figures(records: Sequence[Record]) -> Figures:
    """``table``, ``machine``, and the ranges ``search`` and ``retrain`` of whole steps, ``counting`` in percent."""
    steps: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        found = re.fullmatch(r"(.*) (search|retrain|plain) step(?: that counts)?, (.*)", record["case"])
        assert found is not None, record["case"]
        what, phase, ids = found.groups()
        steps.setdefault((what, ids), {})[phase] = record["ratio"]
    lines = [
        (
            "the whole step" if what == "whole" else what,
            ids.replace("zipf", "Zipf"),
            *(f"{ratios[phase]:.2f}x" for phase in ("search", "retrain")),
            f"{ratios['plain'] - 1:.1%}" if "plain" in ratios else "",
        )
        for (what, ids), ratios in steps.items()
    ]
    whole = [ratios for (what, _), ratios in steps.items() if what == "whole"]
    return {
        "table": table(("", "ids", "search", "retrain", "counting adds"), lines),
        "machine": machine(records[0]),
        **{phase: span(ratios[phase] for ratios in whole) for phase in ("search", "retrain")},
    }
