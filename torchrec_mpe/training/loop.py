"""One phase of training, and evaluation: the loop that a user of the library writes, as the command line has it."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch import distributed as dist
from torchmetrics.functional.classification import binary_auroc
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType
from torchrec.optim.optimizers import in_backward_optimizer_filter
from tqdm import tqdm

from torchrec_mpe.data import PreparedDataset
from torchrec_mpe.distributed import sharders
from torchrec_mpe.errors import UserError
from torchrec_mpe.frequency import embedding_bag_configs
from torchrec_mpe.search import bit_penalty

_CURVE_POINTS = 40


@dataclass(frozen=True)
class Hyperparameters:
    """How every method is trained.

    Attributes:
        batch_size (int): rows a step.
        row_learning_rate (float): of the rows' row-wise Adagrad, fused into FBGEMM's TBE.
        learning_rate (float): of Adam for the dense network.
        quantizer_learning_rate (float): of Adam for alpha, beta, gamma and the 0-bit vectors.

    Adam's learning rates fall linearly to zero over each phase; row-wise Adagrad's steps shrink by themselves.
    """

    batch_size: int = 512
    row_learning_rate: float = 0.02
    learning_rate: float = 1e-3
    quantizer_learning_rate: float = 1e-3


@dataclass
class Curve:
    """Training log loss by step, averaged over windows, and validation AUC."""

    phase: str
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)


def shard(model: nn.Module, settings: Hyperparameters, device: torch.device) -> DistributedModelParallel:
    """A model under DistributedModelParallel, its rows in fused TBEs with row-wise Adagrad."""
    fused_params = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": settings.row_learning_rate}
    constraint = ParameterConstraints(
        sharding_types=[ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value],
        compute_kernels=[EmbeddingComputeKernel.FUSED.value],
    )
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device=device.type),
        batch_size=settings.batch_size,
        constraints={table.name: constraint for table in embedding_bag_configs(model)},
    )
    chosen = sharders(fused_params)
    plan = planner.collective_plan(model, chosen, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=device, plan=plan, sharders=chosen)


def optimizer_of(model: DistributedModelParallel, settings: Hyperparameters) -> torch.optim.Optimizer:
    """A fresh Adam for all but the rows, with the quantizers in a parameter group of their own."""
    dense: list[nn.Parameter] = []
    quantizer: list[nn.Parameter] = []
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        (quantizer if ".mpe." in f".{name}" else dense).append(parameter)
    groups = [{"params": dense, "lr": settings.learning_rate}]
    if quantizer:
        groups.append({"params": quantizer, "lr": settings.quantizer_learning_rate})
    return torch.optim.Adam(groups)


def train_phase(
    model: DistributedModelParallel,
    data: PreparedDataset,
    settings: Hyperparameters,
    *,
    phase: str,
    epochs: int,
    seed: int,
    penalize_bits: bool = False,
    progress: bool = True,
) -> Curve:
    """Train for some epochs with a fresh optimizer; row updates happen inside the TBE's backward.

    Args:
        model (DistributedModelParallel): (dense, sparse) -> logits.
        data (PreparedDataset): its training rows are read, its validation rows evaluated after each epoch.
        settings (Hyperparameters): batch size and learning rates.
        phase (str): name for the progress bar and the curve.
        epochs (int): passes over the training rows.
        seed (int): of the rows' order.
        penalize_bits (bool): add :func:`bit_penalty` to the loss.
        progress (bool): show a progress bar.

    Raises:
        UserError: if the loss is not finite.
    """
    optimizer = optimizer_of(model, settings)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    steps = data.num_batches("train", settings.batch_size, drop_last=True, world_size=world_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps * epochs + 1))
    window = max(1, steps * epochs // _CURVE_POINTS)
    curve = Curve(phase)
    running, step = torch.zeros((), device=model.device), 0
    with tqdm(total=steps * epochs, desc=phase, unit="step", disable=not progress or rank > 0, leave=False) as bar:
        for epoch in range(epochs):
            model.train()
            batches = data.batches(
                "train",
                settings.batch_size,
                shuffle_seed=seed * 1000 + epoch,
                drop_last=True,
                rank=rank,
                world_size=world_size,
            )
            for batch in batches:
                batch = batch.to(model.device)
                logits = model(batch.dense_features, batch.sparse_features).squeeze(1)
                loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
                running += loss.detach()
                if penalize_bits:
                    loss = loss + bit_penalty(model)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                bar.update()
                if step % window == 0:
                    mean = float(running) / window
                    if not mean < float("inf"):
                        raise UserError(f"the loss is not finite after {step} steps of {phase}: training diverged")
                    curve.steps.append(step)
                    curve.loss.append(mean)
                    bar.set_postfix(loss=f"{mean:.4f}")
                    running.zero_()
            curve.validation.append({"step": step, "auc": evaluate(model, data, "validation", model.device)["auc"]})
    return curve


@torch.no_grad()
def predict(
    model: nn.Module, data: PreparedDataset, split: str, device: torch.device, batch_size: int = 8192
) -> tuple[Tensor, Tensor]:
    """Logits and labels of a split, float32 [rows] each, on CPU."""
    model.eval()
    logits, labels = [], []
    for batch in data.batches(split, batch_size):
        batch = batch.to(device)
        logits.append(model(batch.dense_features, batch.sparse_features).squeeze(1).float().cpu())
        labels.append(batch.labels.cpu())
    return torch.cat(logits), torch.cat(labels)


def evaluate(model: nn.Module, data: PreparedDataset, split: str, device: torch.device) -> dict[str, float]:
    """AUC (exact, ties counted half) and log loss of a split."""
    logits, labels = predict(model, data, split, device)
    return {
        "auc": float(binary_auroc(logits.double().sigmoid(), labels.int())),
        "logloss": float(F.binary_cross_entropy_with_logits(logits.double(), labels.double())),
    }
