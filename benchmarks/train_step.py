"""What a search step and a retrain step cost beside the plain fp32 step of the same sharded model.

    python benchmarks/train_step.py             # DLRM, D=16, 26 tables of 100,000 rows, batch 2048; 2 minutes
    python benchmarks/train_step.py --quick     # fewer repetitions; ends within a minute

One rank, one thread. The plain step is TorchRec's own: pooled lookup in FBGEMM's fused TBE (row-wise Adagrad), DLRM
with the layers of TorchRec's example (512-256-D and 512-512-256-1), Adam for the dense network. Search and retrain
steps are the same with their quantizers, search with its penalty. A step is forward, loss, backward and optimizer.

Ids are drawn per table with probability proportional to log(1 + 1/i), close to Zipf's law, or uniformly; ten or one a
bag. Each is measured for the whole step and for the embeddings alone (the loss is a function of their weighted sum),
where nothing hides what quantization costs. Batches rotate.

Counting frequencies while training (track_frequencies_) is timed inside plain steps that count: its share of the step,
which is too small for the difference of two steps to show.
"""

import argparse
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from measure import interleave, medians, ratio, versions, write_json
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from torchrec_mpe.distributed.local_counts import LocalCounts
from torchrec_mpe.files.text_table import text_table

GOAL = 1.5
COUNTING_GOAL = 0.02  # of a step
WORKLOADS = (("zipf", 10), ("uniform", 10), ("zipf", 1))
DENSE_FEATURES = 13
BATCHES = 4


class EmbeddingsAlone(nn.Module):
    """A weighted sum of the pooled embeddings, as a stand-in for a model."""

    def __init__(self, collection: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding_bag_collection = collection
        self.register_buffer("factors", torch.randn(width, generator=torch.Generator().manual_seed(3)))

    def forward(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        return (self.embedding_bag_collection(features).values() @ self.factors).unsqueeze(1)


class RowWiseOnCpu(EmbeddingBagCollectionSharder):
    """TorchRec's sharder; it does not list row-wise sharding for CPU, where it runs."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [*super().sharding_types(compute_device_type), ShardingType.ROW_WISE.value]


def tables(options: argparse.Namespace) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=f"t{t}", num_embeddings=options.rows, embedding_dim=options.dim, feature_names=[f"f{t}"]
        )
        for t in range(options.tables)
    ]


def draw(options: argparse.Namespace, shape: tuple[int, ...], ids: str, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if ids == "uniform":
        return (uniform * options.rows).long()
    return (torch.exp(uniform * math.log(options.rows + 1)) - 1).long().clamp(0, options.rows - 1)


def batches(
    options: argparse.Namespace, ids: str, length: int, seed: int = 1
) -> list[tuple[Tensor, KeyedJaggedTensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(BATCHES):
        values = draw(options, (options.tables * options.batch * length,), ids, generator)
        lengths = torch.full((options.tables * options.batch,), length)
        features = KeyedJaggedTensor([f"f{t}" for t in range(options.tables)], values, lengths=lengths)
        dense = torch.rand(options.batch, DENSE_FEATURES, generator=generator)
        made.append((dense, features, (torch.rand(options.batch, generator=generator) < 0.3).float()))
    return made


def build(
    options: argparse.Namespace, phase: str, alone: bool, sharding: str = ShardingType.TABLE_WISE.value
) -> DistributedModelParallel:
    """The model of a phase, sharded over all ranks; phase "torchrec" is TorchRec's own collection and sharder."""
    configs = tables(options)
    kind = EmbeddingBagCollection if phase == "torchrec" else mpe.MPEEmbeddingBagCollection
    collection = kind(configs, device=torch.device("meta"))
    model: nn.Module
    if alone:
        model = EmbeddingsAlone(collection, options.tables * options.dim)
    else:
        model = DLRM(collection, DENSE_FEATURES, [512, 256, options.dim], [512, 512, 256, 1])
    counts = {c.name: 1_000_000 // torch.arange(1, c.num_embeddings + 1) for c in configs}
    if phase == "search":
        mpe.prepare_search_(model, counts, mpe.SearchConfig())
    elif phase == "retrain":
        mpe.prepare_retrain_(model, mpe.precision_from_frequencies(counts, configs, ratio=20))
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.02}
    sharders = [RowWiseOnCpu(fused_params=fused)] if phase == "torchrec" else mpe.sharders(fused)
    constraint = ParameterConstraints(sharding_types=[sharding], compute_kernels=[EmbeddingComputeKernel.FUSED.value])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
        constraints={c.name: constraint for c in configs},
    )
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def step_of(model: DistributedModelParallel, phase: str, data: list[Any]) -> Callable[[], None]:
    """A training step over the next of the batches."""
    # What is left besides the rows, which their TBE updates.
    parameters = [p for name, p in model.named_parameters() if "embedding_bags" not in name]
    optimizer = torch.optim.Adam(parameters, lr=1e-3) if parameters else None
    turn: Iterator[Any] = itertools.cycle(data)

    def step() -> None:
        dense, features, labels = next(turn)
        logits = model(dense, features)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.squeeze(1), labels)
        if phase == "search":
            loss = loss + mpe.bit_penalty(model)
        if optimizer is not None:
            optimizer.zero_grad()
        loss.backward()
        if optimizer is not None:
            optimizer.step()

    return step


def share_of_counting(model: DistributedModelParallel, data: list[Any], seconds: float) -> tuple[float, float]:
    """Seconds of counting a step and of the whole step, medians over plain steps that count."""
    mpe.track_frequencies_(model)
    counting: list[float] = []
    update = LocalCounts.update

    def timed(counts: LocalCounts, features: Any) -> None:
        begin = time.perf_counter()
        update(counts, features)
        counting.append(time.perf_counter() - begin)

    LocalCounts.update = timed  # type: ignore[method-assign]
    try:
        times = interleave({"step": step_of(model, "plain", data)}, seconds, min_rounds=10)
    finally:
        LocalCounts.update = update  # type: ignore[method-assign]
    return statistics.median(counting), statistics.median(times["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ends within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--rows", type=int, default=100_000, help="of each table")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("RANK", "0")
    rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)

    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    lines = [["step", "ids", "ids a bag", "fp32 ms", "search ms", "ratio", "retrain ms", "ratio", "goal"]]
    cases: list[dict[str, Any]] = []
    for alone in (False, True):
        models = {phase: build(options, phase, alone) for phase in ("plain", "search", "retrain")}
        for ids, length in WORKLOADS:
            data = batches(options, ids, length)
            steps = {phase: step_of(model, phase, data) for phase, model in models.items()}
            times = interleave(steps, seconds=3 if options.quick else 15, min_rounds=4 if options.quick else 10)
            middle = medians(times)
            ratios = {phase: ratio(times, phase, "plain") for phase in ("search", "retrain")}
            what = "embeddings alone" if alone else "whole"
            goal = None if alone else GOAL
            lines.append(
                [what, ids, str(length), f"{middle['plain'] * 1e3:.1f}"]
                + [x for p in ratios for x in (f"{middle[p] * 1e3:.1f}", f"{ratios[p]:.2f}")]
                + ["-" if goal is None else f"<= {goal}"]
            )
            for phase, bits in (("search", "0 to 6"), ("retrain", "mixed")):
                cases.append(
                    {
                        "case": f"{what} {phase} step, {ids} ids, {length} a bag",
                        "dim": options.dim,
                        "bits": bits,
                        "rival": "plain fp32 step",
                        "ratio": ratios[phase],
                        "goal": goal,
                        "seconds": middle[phase],
                        "rival_seconds": middle["plain"],
                    }
                )
    print(text_table(lines))
    lines = [["counting", "ids", "ids a bag", "ms a step", "share", "goal"]]
    model = build(options, "plain", alone=False)
    for ids, length in WORKLOADS:
        counted, whole = share_of_counting(model, batches(options, ids, length), 1 if options.quick else 5)
        lines.append(
            [
                "whole step",
                ids,
                str(length),
                f"{counted * 1e3:.2f}",
                f"{counted / whole:.2%}",
                f"<= {COUNTING_GOAL:.0%}",
            ]
        )
        cases.append(
            {
                "case": f"whole plain step that counts, {ids} ids, {length} a bag",
                "dim": options.dim,
                "bits": None,
                "rival": "the same step without counting",
                "ratio": whole / (whole - counted),
                "goal": 1 / (1 - COUNTING_GOAL),
                "seconds": whole,
                "rival_seconds": whole - counted,
            }
        )
    print(text_table(lines))
    if options.json:
        write_json(options.json, cases)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
