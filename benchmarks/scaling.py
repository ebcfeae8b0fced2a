"""Training steps on 1, 2 and 4 ranks: TorchRec's own collection beside ours in each phase, in one run.

    python benchmarks/scaling.py             # DLRM, D=16, 26 tables of 50,000 rows, 512 examples a rank; 3 minutes
    python benchmarks/scaling.py --quick     # fewer repetitions; ends within a minute and a half

Weak scaling: every rank has its own batches of the same size. The ranks are processes of one thread on this machine,
over gloo: with more ranks than cores they share them, so read across a line, ours against TorchRec's, and not down a
column. All models of a world size live in the same processes and step in turns, each step between barriers; figures are
medians of rank 0.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import interleave, medians, ratio, versions, write_json
from train_step import batches, build, step_of

from torchrec_mpe.files.text_table import text_table

WORLD_SIZES = (1, 2, 4)
SHARDINGS = ("table_wise", "row_wise")
PHASES = ("torchrec", "plain", "search", "retrain")
GOALS = {"plain": 1.02, "search": 1.5, "retrain": 1.5}


def _rank(rank: int, ranks: int, store: str, options: argparse.Namespace, result: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    found = {}
    for sharding in SHARDINGS:
        steps = {}
        for phase in PHASES:
            step = step_of(build(options, phase, False, sharding), phase, batches(options, "zipf", 10, seed=rank))

            def together(step: Any = step) -> None:
                step()
                dist.barrier()

            steps[phase] = together
        # Every rank must make as many rounds: time does not decide.
        times = interleave(steps, seconds=0, min_rounds=options.rounds)
        found[sharding] = {"seconds": medians(times), "ratios": {p: ratio(times, p, "torchrec") for p in GOALS}}
    if rank == 0:
        Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians and ratios of one world size, by sharding type."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        processes = [
            context.Process(target=_rank, args=(r, ranks, str(Path(folder) / "store"), options, str(result)))
            for r in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"a rank of {ranks} failed")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ends within a minute and a half")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--rows", type=int, default=50_000, help="of each table")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch", type=int, default=512, help="examples a rank")
    options = parser.parse_args()
    options.rounds = 8 if options.quick else 40
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    lines = [["sharding", "ranks", "torchrec ms", "plain", "search", "retrain", "examples/s torchrec", "search"]]
    cases: list[dict[str, Any]] = []
    for ranks in WORLD_SIZES:
        for sharding, found in on_ranks(ranks, options).items():
            seconds, ratios = found["seconds"], found["ratios"]
            lines.append(
                [sharding, str(ranks), f"{seconds['torchrec'] * 1e3:.1f}"]
                + [f"{ratios[phase]:.2f}" for phase in GOALS]
                + [f"{ranks * options.batch / seconds[phase]:,.0f}" for phase in ("torchrec", "search")]
            )
            cases += [
                {
                    "case": f"{phase} step, {sharding}, {ranks} ranks",
                    "dim": options.dim,
                    "rival": "TorchRec's own collection",
                    "ratio": ratios[phase],
                    "goal": goal,
                    "seconds": seconds[phase],
                    "rival_seconds": seconds["torchrec"],
                }
                for phase, goal in GOALS.items()
            ]
    print(text_table(lines))
    if options.json:
        write_json(options.json, cases)


if __name__ == "__main__":
    main()
