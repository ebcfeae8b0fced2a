"""Train a DLRM at mixed precision: plain_torchrec.py with a few lines changed.

python examples/swap_in.py
torchx run -s local_cwd dist.ddp -j 1x2 --script examples/swap_in.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec import EmbeddingBagCollection
from torchrec.datasets.random import RandomRecDataset
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.optimizers import in_backward_optimizer_filter

import torchrec_mpe as mpe

FEATURES = ["user", "item", "shop"]
ROWS = [100_000, 50_000, 1_000]


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
    model = DLRM(EmbeddingBagCollection(tables, device=torch.device("meta")), 4, [32, 16], [64, 1], device)
    batches = list(
        RandomRecDataset(FEATURES, 256, hash_sizes=ROWS, manual_seed=dist.get_rank(), num_dense=4, num_batches=20)
    )

    counts = mpe.count_frequencies(batches, model).merge_across_ranks()
    mpe.prepare_search_(model, counts, mpe.SearchConfig())

    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.02}
    sharders = mpe.sharders(fused)
    topology = Topology(world_size=dist.get_world_size(), compute_device=device.type)
    planner = mpe.MPEShardingPlanner(topology=topology, batch_size=256)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    dmp = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)

    def train(search: bool) -> None:
        optimizer = torch.optim.Adam(dict(in_backward_optimizer_filter(dmp.named_parameters())).values(), lr=1e-3)
        for batch in batches:
            batch = batch.to(device)
            logits = dmp(batch.dense_features, batch.sparse_features).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(logits, batch.labels.float())
            if search:
                loss = loss + mpe.bit_penalty(dmp)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"rank {dist.get_rank()}: loss {loss.item():.4f}")

    train(search=True)
    precision = mpe.sample_precision(dmp)
    mpe.prepare_retrain_(dmp, precision)
    train(search=False)
    packed = mpe.emit_inference_model(dmp)
    if dist.get_rank() == 0:
        print(precision.summary())
        mpe.save(packed, "artifact")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
