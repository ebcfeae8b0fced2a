"""Train a DLRM with TorchRec: the script that swap_in.py changes.

python examples/plain_torchrec.py
torchx run -s local_cwd dist.ddp -j 1x2 --script examples/plain_torchrec.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec import EmbeddingBagCollection
from torchrec.datasets.random import RandomRecDataset
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.optimizers import in_backward_optimizer_filter

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

    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.02}
    sharders = [EmbeddingBagCollectionSharder(fused_params=fused)]
    topology = Topology(world_size=dist.get_world_size(), compute_device=device.type)
    constraints = {t.name: ParameterConstraints(compute_kernels=["fused"]) for t in tables}
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    dmp = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)

    def train() -> None:
        optimizer = torch.optim.Adam(dict(in_backward_optimizer_filter(dmp.named_parameters())).values(), lr=1e-3)
        for batch in batches:
            batch = batch.to(device)
            logits = dmp(batch.dense_features, batch.sparse_features).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(logits, batch.labels.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"rank {dist.get_rank()}: loss {loss.item():.4f}")

    train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
