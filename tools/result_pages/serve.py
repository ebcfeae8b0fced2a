"""The HTTP server under load: benchmarks/serve.py."""

from collections.abc import Sequence

from result_pages.text import Figures, Record, machine, span, table

_SERVERS = {"fp32": "fp32", "int8": "INT8", "int4": "INT4", "packed": "packed"}


def figures(records: Sequence[Record]) -> Figures:
    """``table``, ``machine``, ``p99`` by case, MB of the servers, and requests a second with and without joining."""
    by_key = {(r["case"], r["variant"]): r for r in records}
    cases = [case for case in dict.fromkeys(r["case"] for r in records) if case != "memory"]
    lines: list[tuple[str, ...]] = []
    for case in cases:
        servers = [by_key[case, name] for name in _SERVERS]
        lines += [
            (case, "p50 / p99 ms", *(f"{r['p50_ms']:.1f} / {r['p99_ms']:.0f}" for r in servers)),
            ("", "requests/s", *(f"{r['requests_per_second']:.0f}" for r in servers)),
            ("", "CPU ms; model alone ms", *(f"{r['cpu_ms']:.2f}; {r['model_ms']:.2f}" for r in servers)),
        ]
    memory = [by_key["memory", name] for name in _SERVERS]
    lines += [
        (
            "memory, MB",
            "RSS at start / after the load",
            *(f"{r['rss_at_start'] / 1e6:.0f} / {r['rss'] / 1e6:.0f}" for r in memory),
        ),
        ("", "PSS after the load", *(f"{r['pss'] / 1e6:.0f}" for r in memory)),
    ]
    empty = by_key["memory", "no tables"]["rss_at_start"]
    packed = [by_key[case, "packed"] for case in cases]
    found = {
        "table": table(("", "", *_SERVERS.values()), lines),
        "machine": machine(records[0]),
        "p99 ratios": span(r["ratio"] for r in packed),
        "no tables": f"{empty / 1e6:.0f}",
        "joined": f"{by_key[cases[0], 'packed']['requests_per_second']:.0f}",
        "not joined": f"{by_key[cases[0], 'packed, not joined']['requests_per_second']:.0f}",
    }
    for r in packed:
        found[f"p99: {r['case']}"] = f"{r['ratio']:.2f}"
    for name in _SERVERS:
        at_start = by_key["memory", name]["rss_at_start"]
        found[f"{name}: RSS"] = f"{at_start / 1e6:.0f}"
        found[f"{name}: tables"] = f"{(at_start - empty) / 1e6:.0f}"
    return found
