"""The op that quantizes and pools rows in search and retraining, against what PyTorch makes of the same formulas.

    python benchmarks/search_op.py             # 2 minutes
    python benchmarks/search_op.py --quick     # within one minute

One thread, float32, the default candidates of 0 to 6 bits, random groups, the bags of 26 features side by side with one
id each, as of a Criteo batch: N ids in all. Rivals of search, forward and backward: the eager reference; torch.compile
of forward and backward composed of PyTorch's own operations (straight-through gradients by autograd); and, for either
direction alone, a copy of as many bytes as it must at least move: forward reads and writes N*D floats, backward reads
two and writes one time that many.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import interleave, medians, ratio, versions, write_json
from torch import Tensor

from torchrec_mpe.files.text_table import text_table
from torchrec_mpe.ops.bags import SUM, Bags
from torchrec_mpe.ops.quantized_embedding_bag import quantized_embedding_bag

BITS = (0, 1, 2, 3, 4, 5, 6)
TABLES, GROUPS = 26, 312
SHAPES = ((53_248, 16), (53_248, 64), (499_200, 16))


def composed(
    rows: Tensor,
    group: Tensor,
    probabilities: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor,
    table: Tensor,
    scale: Sequence[float],
) -> Tensor:
    """Search written down in PyTorch's operations, for autograd and the compiler."""
    p = probabilities[group]
    total = p[:, :1] * zero_rows[table]
    for k, bits in enumerate(BITS[1:], start=1):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        step = alpha[k] * scale[k] + (alpha[k] * (1 - scale[k])).detach()
        offset = beta * scale[k] + (beta * (1 - scale[k])).detach()
        v = (rows - offset) / step
        code = v + (v.round() - v).detach()
        code = torch.where((low <= code) & (code <= high), code, code.detach().clamp(low, high))
        total = total + p[:, k : k + 1] * (code * step + offset)
    return total.view(TABLES, -1, rows.shape[1]).transpose(0, 1).reshape(rows.shape[0] // TABLES, -1)


def inputs(rows: int, dim: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    std = 0.003
    step_sizes = [1.0] + [2 * 0.8 * std / 2 ** ((b - 1) / 2) for b in BITS[1:]]
    leaves = {
        "rows": torch.randn(rows, dim, generator=g) * std,
        "probabilities": torch.softmax(torch.randn(GROUPS, len(BITS), generator=g), 1),
        "alpha": torch.tensor(step_sizes),
        "beta": torch.randn(dim, generator=g) * 1e-4,
        "zero_rows": torch.randn(TABLES, dim, generator=g) * std,
    }
    others = {
        "group": torch.randint(GROUPS, (rows,), generator=g),
        "table": torch.arange(TABLES).repeat_interleave(rows // TABLES),
        "candidate": torch.randint(len(BITS), (rows,), generator=g).to(torch.uint8),
        "scale": torch.full((len(BITS),), 0.01),
        "grad": torch.randn(rows // TABLES, TABLES * dim, generator=g),
    }
    return {**{name: leaf.requires_grad_() for name, leaf in leaves.items()}, **others}


def calls(x: dict[str, Tensor], compiled: Callable[..., Tensor]) -> dict[str, Callable[[], object]]:
    """What is timed, by name; nothing accumulates gradients."""
    batch = len(x["rows"]) // TABLES
    bags = Bags(
        ids=torch.arange(batch).repeat(TABLES),
        offsets=torch.arange(len(x["rows"]) + 1),
        bags_per_feature=[batch] * TABLES,
        first_row=[batch * t for t in range(TABLES)],
        num_rows=[batch] * TABLES,
        table=range(TABLES),
        pooling_mode=[SUM] * TABLES,
        side_by_side=True,
    )
    shared = x["alpha"], x["beta"], x["zero_rows"], BITS, x["scale"]
    searched = x["group"], x["probabilities"], *shared
    fixed = x["candidate"], None, *shared
    leaves = [x[name] for name in ("rows", "probabilities", "alpha", "beta", "zero_rows")]
    of_fixed = [x[name] for name in ("rows", "alpha", "beta", "zero_rows")]
    of_composed = [x[name] for name in ("rows", "group", "probabilities", "alpha", "beta", "zero_rows", "table")]
    scale = x["scale"].tolist()

    def search(backend: str) -> object:
        out = quantized_embedding_bag(x["rows"], bags, *searched, backend=backend)
        return torch.autograd.grad(out, leaves, x["grad"])

    def retrain(backend: str) -> object:
        out = quantized_embedding_bag(x["rows"], bags, *fixed, backend=backend)
        return torch.autograd.grad(out, of_fixed, x["grad"])

    def plain(arguments: Sequence[Any]) -> list[Any]:
        flat = x["rows"], *bags, *arguments, 1.0
        return [a.detach() if isinstance(a, Tensor) else a for a in flat]

    plain_searched, plain_fixed = plain(searched), plain(fixed)
    # A copy of n floats moves 2 n: one is read, one written.
    size = x["rows"].numel()
    source, target = torch.randn(size), torch.empty(size)
    source_of_backward, target_of_backward = torch.randn(size * 3 // 2), torch.empty(size * 3 // 2)
    forward = torch.ops.torchrec_mpe.quantized_embedding_bag
    backward = torch.ops.torchrec_mpe.quantized_embedding_bag_backward
    return {
        "search": lambda: search("cpu"),
        "search eager": lambda: search("reference"),
        "search torch.compile": lambda: torch.autograd.grad(compiled(*of_composed, scale), leaves, x["grad"]),
        "retrain": lambda: retrain("cpu"),
        "retrain eager": lambda: retrain("reference"),
        "search forward": lambda: forward(*plain_searched),
        "search backward": lambda: backward(x["grad"], *plain_searched, False),
        "retrain forward": lambda: forward(*plain_fixed),
        "retrain backward": lambda: backward(x["grad"], *plain_fixed, False),
        "copy forward": lambda: target.copy_(source),
        "copy backward": lambda: target_of_backward.copy_(source_of_backward),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    compiled = torch.compile(composed, fullgraph=True, dynamic=True)
    lines = [["op", "N", "D", "ms", "rival", "ms", "ratio", "goal"]]
    cases: list[dict[str, Any]] = []
    for rows, dim in SHAPES[: 2 if options.quick else 3]:
        timed = calls(inputs(rows, dim), compiled)
        slow = {name: call for name, call in timed.items() if name in ("search", "retrain") or "eager" in name}
        slow["search torch.compile"] = timed["search torch.compile"]
        fast = {name: call for name, call in timed.items() if name not in slow or name in ("search", "retrain")}
        seconds = 4 if options.quick else 15
        of_slow = interleave(slow, seconds, min_rounds=3 if options.quick else 7, warm=True)
        of_fast = interleave(fast, seconds, min_rounds=20)
        compared = [
            ("search", "search eager", "eager", of_slow, 20.0),
            ("search", "search torch.compile", "torch.compile", of_slow, 3.0),
            ("retrain", "retrain eager", "eager", of_slow, None),
            ("search forward", "copy forward", "copy of the same bytes", of_fast, 0.5),
            ("search backward", "copy backward", "copy of the same bytes", of_fast, 0.35),
            ("retrain forward", "copy forward", "copy of the same bytes", of_fast, None),
            ("retrain backward", "copy backward", "copy of the same bytes", of_fast, None),
        ]
        for name, rival, shown, times, goal in compared:
            middle, value = medians(times), ratio(times, rival, name)
            lines.append(
                [
                    *(name, f"{rows:,}", str(dim), f"{middle[name] * 1e3:.2f}", shown, f"{middle[rival] * 1e3:.2f}"),
                    *(f"{value:.2f}", "-" if goal is None else f">= {goal}"),
                ]
            )
            cases.append(
                {
                    "case": f"{name}, {rows} rows",
                    "dim": dim,
                    "bits": "0 to 6",
                    "rival": shown,
                    "ratio": value,
                    "goal": goal,
                    "seconds": middle[name],
                    "rival_seconds": middle[rival],
                }
            )
    print(text_table(lines))
    if options.json:
        write_json(options.json, cases)


if __name__ == "__main__":
    main()
