"""Lookups of packed rows on the CPU: benchmarks/lookup.py."""

from collections.abc import Sequence

from result_pages.text import Figures, Record, machine, span, table

_DIMS = (16, 64, 128)
_NAMES = {"mixA": "a mix of 1.36 bits", "mixB": "a mix of 0.14 bits", "0/4": "half 4 bits, half none"}
_MEAN, _HOT, _NEW, _OUT = "mean of 8 cells", "hot: 40 ids, L=40", "L=1, new outputs", "L=1, ours with out="


def figures(records: Sequence[Record]) -> Figures:
    """Tables ``means``, ``edges`` and ``directories``; ``threads``; ``machine``; ranges of the means against INT8 to 2.

    A ratio is the rival's time over ours.
    """
    native = records[0]["capability"]
    by_key = {(r["case"], r["bits"], r["rival"], r["dim"], r["capability"]): r for r in records}

    def cell(case: str, bits: str, rival: str, dim: int) -> str:
        restrained = by_key.get((case, bits, rival, dim, "avx2")) if native != "avx2" else None
        in_brackets = f" ({restrained['ratio']:.2f})" if restrained else ""
        return f"{by_key[case, bits, rival, dim, native]['ratio']:.2f}{in_brackets}"

    def ratios(cases: Sequence[str], with_case: bool) -> str:
        keys = dict.fromkeys((r["case"], r["bits"], r["rival"]) for r in records if r["case"] in cases)
        lines = [
            (
                *([case.replace("out=", "`out=`")] if with_case else []),
                _width(bits),
                rival.replace("EmbeddingBag", "nn.EmbeddingBag"),
                *(cell(case, bits, rival, dim) for dim in _DIMS),
            )
            for case, bits, rival in keys
        ]
        head = (*(["ids"] if with_case else []), "ours", "against", *(f"D={dim}" for dim in _DIMS))
        return table(head, lines)

    found = {
        "machine": machine(records[0]),
        "means": ratios([_MEAN], with_case=False),
        "edges": ratios([_HOT, _NEW, _OUT], with_case=True),
        "threads": next(f"{r['ratio']:.2f}" for r in records if r["case"].startswith("two threads")),
    }
    directories = [r for r in records if "directory" in r["case"] and r["capability"] == native]
    found["directories"] = table(
        ("directory", "rows", "ns a row", "INT4, ns a row"),
        [
            (r["case"].partition(" ")[0], _width(r["bits"]), f"{r['ns']:.1f}", f"{r['rival_ns']:.1f}")
            for r in directories
        ],
    )
    means = [r for r in records if r["case"] == _MEAN]
    for capability in sorted({r["capability"] for r in means}):
        quantized = [r for r in means if r["capability"] == capability and r["rival"].startswith("INT")]
        found[f"against INT, {capability}"] = span(r["ratio"] for r in quantized)
    return found


def _width(bits: str) -> str:
    if bits.startswith("coded"):
        return f"{bits} smaller than fp32"
    return _NAMES.get(bits) or f"{bits} bit{'s' if bits != '1' else ''}"
