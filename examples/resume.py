"""swap_in.py as a job that survives: it saves checkpoints and goes on from the newest one, in either phase.

python examples/resume.py
torchx run -s local_cwd dist.ddp -j 1x2 --script examples/resume.py \
    --env PET_MAX_RESTARTS=3,TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

Kill a rank, or the whole job, and start it again: the same losses follow. The first variable lets torchelastic start
the ranks anew, the second gives each start a store of its own (pytorch/pytorch#135712). For your own DLRM, swap TABLES,
build_model and read_batches; to start over, delete the folder "checkpoints".
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.datasets.random import RandomRecDataset
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.optimizers import in_backward_optimizer_filter

import torchrec_mpe as mpe

FEATURES = ["user", "item", "shop"]
ROWS = [100_000, 50_000, 1_000]
TABLES = [
    EmbeddingBagConfig(name=f"t_{f}", num_embeddings=n, embedding_dim=16, feature_names=[f])
    for f, n in zip(FEATURES, ROWS, strict=True)
]
STEPS_BETWEEN_CHECKPOINTS = 8


def build_model(device: torch.device) -> nn.Module:
    return DLRM(EmbeddingBagCollection(TABLES, device=torch.device("meta")), 4, [32, 16], [64, 1], device)


def read_batches() -> list[Batch]:
    """This rank's batches; the same ones each time, so that a position among them means something."""
    return list(
        RandomRecDataset(FEATURES, 256, hash_sizes=ROWS, manual_seed=dist.get_rank(), num_dense=4, num_batches=20)
    )


def main() -> None:
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29511")):
        os.environ.setdefault(name, default)
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    print(f"rank {dist.get_rank()}: process {os.getpid()}", flush=True)
    torch.manual_seed(0)
    model, batches = build_model(device), read_batches()

    checkpoints = mpe.Checkpoints("checkpoints", keep=2)
    found = checkpoints.newest()
    searching = found is None or found.position["phase"] == "search"
    if found:
        found.prepare_(model)  # into the phase of the checkpoint
    else:
        counts = mpe.count_frequencies(batches, model).merge_across_ranks()
        mpe.prepare_search_(model, counts, mpe.SearchConfig())

    sharders = mpe.sharders({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.02})
    topology = Topology(world_size=dist.get_world_size(), compute_device=device.type)
    planner = mpe.MPEShardingPlanner(topology=topology, batch_size=256)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    dmp = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)

    def train(phase: str, **prepared_with: object) -> None:
        optimizer = torch.optim.Adam(dict(in_backward_optimizer_filter(dmp.named_parameters())).values(), lr=1e-3)
        start = 0
        if found and found.position["phase"] == phase:
            checkpoints.load(dmp, optimizer, found)
            start = found.position["batch"]
            print(f"rank {dist.get_rank()}: {phase} goes on after step {start}", flush=True)
        for step, batch in enumerate(batches[start:], start + 1):
            batch = batch.to(device)
            logits = dmp(batch.dense_features, batch.sparse_features).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(logits, batch.labels.float())
            if phase == "search":
                loss = loss + mpe.bit_penalty(dmp)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"rank {dist.get_rank()}: {phase} step {step} loss {loss.item()}", flush=True)
            if step % STEPS_BETWEEN_CHECKPOINTS == 0 or step == len(batches):
                checkpoints.save(dmp, optimizer, step=step, position={"phase": phase, "batch": step}, **prepared_with)

    if searching:
        train("search", counts=found.counts() if found else counts)
        precision = mpe.sample_precision(dmp)
        mpe.prepare_retrain_(dmp, precision)
    else:
        precision = found.plan()
    train("retrain", plan=precision)
    packed = mpe.emit_inference_model(dmp)
    if dist.get_rank() == 0:
        print(precision.summary())
        mpe.save(packed, "artifact")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
