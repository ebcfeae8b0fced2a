"""A TorchRec script with its train pipeline, optimizer in backward and schedule, trained at mixed precision.

python examples/train_pipeline.py
torchx run -s local_cwd dist.ddp -j 1x2 --script examples/train_pipeline.py

The lines that mention mpe, and the second phase, are all that is new.
"""

import os

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from torchrec import EmbeddingBagCollection
from torchrec.datasets.random import RandomRecDataset
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

import torchrec_mpe as mpe

FEATURES = ["user", "item", "shop"]
ROWS = [10_000, 5_000, 1_000]


def train(dmp: DistributedModelParallel, batches: list[Batch], device: torch.device) -> None:
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(dmp.named_parameters())), lambda params: torch.optim.Adam(params, lr=1e-3)
    )
    optimizer = CombinedOptimizer([("rows", dmp.fused_optimizer), ("dense", dense)])
    schedule = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10))
    pipeline = TrainPipelineSparseDist(dmp, optimizer, device)
    iterator = iter(batches)
    for _ in batches:
        loss, _logits, _labels = pipeline.progress(iterator)
        schedule.step()
    pipeline.detach()
    print(f"rank {dist.get_rank()}: loss {loss.item():.4f}", flush=True)


def main() -> None:
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29511")):
        os.environ.setdefault(name, default)
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)

    tables = [
        EmbeddingBagConfig(name=f"t_{f}", num_embeddings=n, embedding_dim=16, feature_names=[f])
        for f, n in zip(FEATURES, ROWS, strict=True)
    ]
    dlrm = DLRM(EmbeddingBagCollection(tables, device=torch.device("meta")), 4, [32, 16], [64, 1], device)
    batches = list(
        RandomRecDataset(FEATURES, 256, hash_sizes=ROWS, manual_seed=dist.get_rank(), num_dense=4, num_batches=20)
    )
    counts = mpe.count_frequencies(batches, dlrm).merge_across_ranks()
    mpe.prepare_search_(dlrm, counts, mpe.SearchConfig())
    model = mpe.add_bit_penalty_(DLRMTrain(dlrm))
    apply_optimizer_in_backward(torch.optim.Adagrad, dlrm.sparse_arch.parameters(), {"lr": 0.02})

    sharders = mpe.sharders()
    topology = Topology(world_size=dist.get_world_size(), compute_device=device.type)
    planner = mpe.MPEShardingPlanner(topology=topology, batch_size=256)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    dmp = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)

    train(dmp, batches, device)
    precision = mpe.sample_precision(dmp)
    mpe.prepare_retrain_(dmp, precision)
    train(dmp, batches, device)
    packed = mpe.emit_inference_model(dmp)
    if dist.get_rank() == 0:
        print(precision.summary())
        mpe.save(packed.model, "artifact")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
