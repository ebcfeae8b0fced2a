"""Steps on several ranks against TorchRec's own collection: benchmarks/scaling.py."""

from collections.abc import Sequence

from result_pages.text import Figures, Record, machine, span, table

_PHASES = ("plain", "search", "retrain")


def figures(records: Sequence[Record]) -> Figures:
    """``table``, ``machine``, and the range of each phase over shardings and ranks."""
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        phase, sharding, ranks = record["case"].split(", ")[0].split()[0], *record["case"].split(", ")[1:]
        ratios.setdefault((sharding, ranks.partition(" ")[0]), {})[phase] = record["ratio"]
    lines = [
        (sharding.replace("_", "-"), ranks, *(f"{of_phase[phase]:.2f}" for phase in _PHASES))
        for (sharding, ranks), of_phase in ratios.items()
    ]
    return {
        "table": table(("sharding", "ranks", *_PHASES), lines),
        "machine": machine(records[0]),
        **{phase: span(of_phase[phase] for of_phase in ratios.values()) for phase in _PHASES},
    }
