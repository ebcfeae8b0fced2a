"""Training in INT8 or INT4 with a cache: benchmarks/cache.py."""

from collections.abc import Sequence

from result_pages.text import Figures, Record, machine, span, table

_FP16 = "FBGEMM's fp16 weights"


def figures(records: Sequence[Record]) -> Figures:
    """Tables ``memory``, ``steps``, ``auc`` and ``hits``; ``machine``; memory ratios; ranges of whole steps."""
    found = {"machine": machine(records[0])}
    memory = {(r["variant"], r["dim"], r.get("ids")): r["ratio"] for r in records if r["section"] == "memory"}
    dims = sorted({dim for _, dim, _ in memory})
    cached = list(dict.fromkeys(name for name, _, ids in memory if ids))
    lines = [
        (name, *(f"{memory[name, dim, 'zipf']:.2f} ({memory[name, dim, 'uniform']:.2f})" for dim in dims))
        for name in cached
    ]
    lines.append((_FP16, *(f"{memory['fp16', dim, None]:.2f}" for dim in dims)))
    found["memory"] = table(("", *(f"D={dim}" for dim in dims)), lines)
    for name in cached:
        for dim in dims:
            found[f"{name}, D={dim}"] = f"{memory[name, dim, 'zipf']:.1f}"

    steps = [r for r in records if r["section"] == "step"]
    by_key = {(r["variant"], r["ids"], r["threads"], "with a network" in r["case"]): r for r in steps}
    variants = [name for name in dict.fromkeys(r["variant"] for r in steps) if not name.startswith("fp32")]
    kinds = [(threads, network) for network in (False, True) for threads in sorted({r["threads"] for r in steps})]
    lines = []
    for name in [*(v for v in variants if v != "fp16"), "fp16"]:
        for ids in ("zipf", "uniform"):
            chosen = [by_key[name, ids, threads, network] for threads, network in kinds]
            shown = f"{_FP16 if name == 'fp16' else name}, {ids.replace('zipf', 'Zipf')}"
            lines.append((shown, *(f"{r['ratio']:.2f} ({r['ratio_to_one_table']:.2f})" for r in chosen)))
    heads = [
        ("with a network, " if network else "") + f"{threads} thread{'s' if threads > 1 else ''}"
        for threads, network in kinds
    ]
    found["steps"] = table(("", *heads), lines)
    for ids in ("zipf", "uniform"):
        for network in (False, True):
            ratios = [
                r["ratio"]
                for (name, i, _, whole), r in by_key.items()
                if (i, whole) == (ids, network) and name in cached
            ]
            found[f"step{' with a network' if network else ''}, {ids}"] = span(ratios, ".1f")

    auc = {(r["variant"], r["dim"]): r for r in records if r["section"] == "auc"}
    dims = sorted({dim for _, dim in auc})
    compared = [name for name in dict.fromkeys(name for name, _ in auc) if name != "fp32"]
    lines = [
        (name, *(f"{1e4 * auc[name, dim]['change']:+.1f} ± {1e4 * auc[name, dim]['change_error']:.1f}" for dim in dims))
        for name in compared
    ]
    found["auc"] = table(("", *(f"D={dim}" for dim in dims)), lines)
    for name in compared:
        found[f"{name}: changes"] = " and ".join(f"{1e4 * auc[name, dim]['change']:+.1f}" for dim in dims)
    found["seeds"] = str(next(iter(auc.values()))["seeds"])

    hits: dict[str, dict[float, float]] = {}
    for r in records:
        if r["section"] == "hits":
            hits.setdefault(f"{r['source']}, {r['algorithm']}", {})[r["load_factor"]] = r["hit_rate"]
    factors = sorted({factor for of_source in hits.values() for factor in of_source})
    lines = [(source, *(f"{rates[f]:.1%}" for f in factors)) for source, rates in hits.items()]
    found["hits"] = table(("", *(f"{factor:.1%}".replace(".0%", "%") for factor in factors)), lines)
    return found
