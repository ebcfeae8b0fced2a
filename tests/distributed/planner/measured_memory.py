"""The memory of sharded training steps, measured on gloo ranks."""

import gc
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.distributed.planner.planner import MPEShardingPlanner
from torchrec_mpe.modules.cached_embedding_bag_collection import CachedEmbeddingBagCollection
from torchrec_mpe.modules.row_quantizer import RetrainQuantizer, SearchQuantizer

TABLES, ROWS, DIM = 4, 40_000, 64
BATCH, POOLING = 128, 60  # few bags and many ids, so that collectives, which free at times of their own, weigh little


@dataclass(frozen=True)
class Case:
    """One measurement."""

    sharding: str
    phase: str
    optimizer: str = "EXACT_ROWWISE_ADAGRAD"
    weighted: bool = False
    cached: bool = False

    @property
    def kernel(self) -> str:
        if self.cached:
            return str(EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value)
        dense = self.sharding == ShardingType.DATA_PARALLEL.value
        return (EmbeddingComputeKernel.DENSE if dense else EmbeddingComputeKernel.FUSED).value


class Model(nn.Module):
    def __init__(self, tables: list[EmbeddingBagConfig], weighted: bool, cached: bool) -> None:
        super().__init__()
        meta = torch.device("meta")
        if cached:
            # As large as the tables: what a step takes besides does not depend on which rows miss.
            self.ebc = CachedEmbeddingBagCollection(tables, weighted, meta, CacheConfig(load_factor=1.0))
        else:
            self.ebc = mpe.MPEEmbeddingBagCollection(tables, weighted, meta)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        values: Tensor = self.ebc(features).values()
        return values


def tables() -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=f"t{k}", num_embeddings=ROWS, embedding_dim=DIM, feature_names=[f"f{k}"])
        for k in range(TABLES)
    ]


def prepared(case: Case) -> Model:
    """Half of the tables have ids in frequency order."""
    model = Model(tables(), case.weighted, case.cached)
    generator = torch.Generator().manual_seed(0)
    counts = {t.name: torch.randint(1, 100, (ROWS,), generator=generator) for t in tables()}
    counts["t0"], counts["t1"] = counts["t0"].sort(descending=True)[0], counts["t1"].sort(descending=True)[0]
    if case.phase == "search":
        mpe.prepare_search_(model, counts, mpe.SearchConfig())
    elif case.phase == "retrain":
        mpe.prepare_retrain_(model, mpe.precision_from_frequencies(counts, tables(), ratio=20))
    return model


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(cases: list[Case]) -> list[dict[str, Any]]:
    """Of each case, what this rank holds, what it allocates in a step at most, and what the planner estimates."""
    results = []
    for case in cases:
        model = prepared(case)
        sharders = mpe.sharders({"optimizer": EmbOptimType[case.optimizer], "learning_rate": 0.01})
        planner = MPEShardingPlanner(
            Topology(world_size=dist.get_world_size(), compute_device="cpu"),
            batch_size=BATCH,
            constraints={
                t.name: ParameterConstraints(
                    sharding_types=[case.sharding],
                    compute_kernels=[case.kernel],
                    pooling_factors=[POOLING],
                    min_partition=DIM // 2,
                )
                for t in tables()
            },
            stats=[],
            debug=False,
        )
        plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
        estimates: list[Any] = [estimated_by_rank(planner)] if dist.get_rank() == 0 else [None]
        dist.broadcast_object_list(estimates, src=0)
        dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
        result = held_by(dmp.module.ebc)
        result["peak"] = peak_of_a_step(dmp, case)
        result["estimate"] = estimates[0][dist.get_rank()]
        results.append(result)
    return results


def estimated_by_rank(planner: MPEShardingPlanner) -> list[dict[str, int]]:
    """Bytes by rank and kind, from the options of the plan."""
    assert planner._best_plan is not None and planner._storage_estimator is not None
    by_rank: list[dict[str, int]] = [{} for _ in range(planner.topology.world_size)]
    for option in planner._best_plan:
        for shard, held in zip(option.shards, planner._storage_estimator.shard_bytes(option), strict=True):
            assert shard.storage.ddr == sum(held.by_kind().values()), "nothing of it is left out of TorchRec's storage"
            for kind, count in held.by_kind().items():
                by_rank[shard.rank][kind] = by_rank[shard.rank].get(kind, 0) + count
    return by_rank


def held_by(ebc: ShardedMPEEmbeddingBagCollection) -> dict[str, Any]:
    """Bytes of tensors that stay, counted from the tensors."""
    kernels = list(ebc.kernels())
    every = [kernel.emb_module for kernel in kernels]
    caches = [tbe.bytes_by_kind() for tbe in every if isinstance(tbe, CachedTableBatchedEmbeddingBags)]
    tbes = [tbe for tbe in every if not isinstance(tbe, CachedTableBatchedEmbeddingBags)]
    ranks = 0
    for quantizer in ebc.quantizers().values():
        if isinstance(quantizer, SearchQuantizer):
            ranks += quantizer.groups.order.local_bytes  # type: ignore[attr-defined]
        elif isinstance(quantizer, RetrainQuantizer):
            ranks += quantizer.widths._order.local_bytes  # type: ignore[attr-defined]
    return {
        "rows": nbytes(values for tbe in tbes for values in tbe.split_embedding_weights()),
        "optimizer_state": nbytes(
            state
            for tbe in tbes
            if hasattr(tbe, "split_optimizer_states")
            for states in tbe.split_optimizer_states()
            for state in states
        )
        + sum(cache["optimizer_state"] for cache in caches),
        **{kind: sum(cache[kind] for cache in caches) for kind in ("store", "cache", "spill", "directory")},
        "row_map": nbytes(ebc.row_maps()),
        "frequency_order": ranks,
    }


def peak_of_a_step(model: nn.Module, case: Case) -> int:
    """Most bytes allocated at a time in forward and backward, above what there was before."""
    generator = torch.Generator().manual_seed(dist.get_rank())

    def batch() -> KeyedJaggedTensor:
        ids = torch.randint(ROWS, (TABLES * BATCH * POOLING,), generator=generator)
        weights = torch.rand(len(ids), generator=generator) if case.weighted else None
        names = [f"f{k}" for k in range(TABLES)]
        return KeyedJaggedTensor.from_lengths_sync(names, ids, torch.full((TABLES * BATCH,), POOLING), weights)

    def step(features: KeyedJaggedTensor) -> None:
        model(features).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None

    for _ in range(2):
        step(batch())
    features = batch()
    gc.collect()  # else what earlier models leave may be freed in the step, and hides as much of what it allocates
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(features)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


TW, RW, CW, DP = (
    kind.value
    for kind in (
        ShardingType.TABLE_WISE,
        ShardingType.ROW_WISE,
        ShardingType.COLUMN_WISE,
        ShardingType.DATA_PARALLEL,
    )
)
CASES = [Case(kind, phase) for kind in (TW, RW) for phase in ("plain", "search", "retrain")]
CASES += [
    Case(CW, "search"),
    Case(RW, "retrain", "EXACT_ADAGRAD"),
    Case(TW, "search", "EXACT_SGD", weighted=True),
    Case(DP, "search"),
    Case(DP, "plain"),
    Case(TW, "plain", cached=True),
    Case(RW, "search", cached=True),
]
