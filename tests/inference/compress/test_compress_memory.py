"""A table of 200 MiB, sharded over two ranks, is coded without any process ever holding it."""

import ctypes
import gc
import re
from pathlib import Path

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig

import torchrec_mpe as mpe
from tests.distributed.ranks import Ranks

ROWS, DIM = 25 << 15, 64
FP32_MIB = ROWS * DIM * 4 >> 20
BUDGET = ROWS * DIM * 4 // 100


def _memory_mib(kind: str) -> int:
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) >> 10


def _sharded() -> tuple[int, int]:
    """MiB by which the process grew at most while it compressed, and the bytes of what it made."""
    config = EmbeddingBagConfig(name="t", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["f"])
    model = nn.ModuleDict({"ebc": mpe.MPEEmbeddingBagCollection([config], device=torch.device("meta"))})
    sharder = mpe.sharders({"learning_rate": 0.1})[0]
    module_plan = construct_module_sharding_plan(
        model.ebc, {"t": row_wise(compute_kernel="fused")}, sharder, world_size=2, local_size=2, device_type="cpu"
    )
    dmp = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan({"ebc": module_plan}), sharders=[sharder]
    )
    counts = (1e6 / torch.arange(1, ROWS + 1, dtype=torch.float64) ** 1.05).ceil().long()
    # What was freed goes back to the system, not into the growth; then the peak starts anew.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory_mib("VmRSS")
    coded = mpe.compress(dmp, {"t": counts}, bytes=BUDGET)
    return _memory_mib("VmHWM") - before, coded.ebc.size_report().total


def test_no_process_holds_a_whole_table(two_ranks: Ranks) -> None:
    for growth, size in two_ranks.run(_sharded):
        # 2 MiB are packed, the rest are pieces of 4 MiB, the sample of each group and its errors at every width.
        assert growth < FP32_MIB / 2, f"a table of {FP32_MIB} MiB as float32 took {growth} MiB"
        assert 0.99 * BUDGET <= size <= BUDGET
