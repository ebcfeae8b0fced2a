"""A table of 200 MiB, sharded over two ranks, is emitted without any process ever holding it."""

import ctypes
import gc
import hashlib
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
from torchrec_mpe.precision.from_frequencies import cut_precision

ROWS, DIM = 25 << 15, 64
FP32_MIB = ROWS * DIM * 4 >> 20


def _prepared(device: str) -> nn.Module:
    config = EmbeddingBagConfig(name="t", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["f"])
    model = nn.ModuleDict({"ebc": mpe.MPEEmbeddingBagCollection([config], device=torch.device(device))})
    counts = torch.randint(0, 1000, (ROWS,), generator=torch.Generator().manual_seed(0))
    mpe.prepare_retrain_(model, cut_precision({"t": counts}, [config], 3, 0.5))
    return model


def _memory_mib(kind: str) -> int:
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) >> 10


def _sharded() -> tuple[int, str]:
    """MiB by which the process grew at most while it emitted, and a digest of the packed rows."""
    model = _prepared("meta")
    sharder = mpe.sharders({"learning_rate": 0.1})[0]
    module_plan = construct_module_sharding_plan(
        model.ebc, {"t": row_wise(compute_kernel="fused")}, sharder, world_size=2, local_size=2, device_type="cpu"
    )
    dmp = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan({"ebc": module_plan}), sharders=[sharder]
    )
    shards = list(dmp.module.ebc.local_shards())
    assert sum(values.nbytes for *_, values in shards) == ROWS * DIM * 2
    # What was freed goes back to the system, not into the growth; then the peak starts anew.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory_mib("VmRSS")
    emitted = mpe.emit_inference_model(dmp)
    return _memory_mib("VmHWM") - before, _digest(emitted)


def _digest(emitted: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in emitted.ebc.packed_tables().tensors().items():
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_no_process_holds_a_whole_table(two_ranks: Ranks) -> None:
    results = two_ranks.run(_sharded)
    digest = _digest(mpe.emit_inference_model(_prepared("cpu")))
    for growth, of_rank in results:
        # 10 MiB are packed, the rest are pieces of 8 MiB and the frequency order of the rows.
        assert growth < FP32_MIB / 2, f"a table of {FP32_MIB} MiB as float32 took {growth} MiB"
        assert of_rank == digest
