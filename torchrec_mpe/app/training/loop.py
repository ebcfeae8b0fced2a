"""One phase of training, and evaluation: the loop that a user of the library writes, as the command line has it."""

import math
import os
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch import distributed as dist
from torchmetrics.functional.classification import binary_auroc
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.training.cache_counters import cache_statistics
from torchrec_mpe.app.training.phase_checkpoints import PhaseCheckpoints, Position
from torchrec_mpe.app.training.settings import RunSettings, Settings
from torchrec_mpe.app.training.step_log import StepLog
from torchrec_mpe.cache.statistics import CacheStatistics
from torchrec_mpe.distributed.batch_norms import average_batch_norms
from torchrec_mpe.distributed.default_sharders import sharders
from torchrec_mpe.distributed.planner.planner import MPEShardingPlanner
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.progress import progress_bar
from torchrec_mpe.modules.cached_embedding_bag_collection import CachedEmbeddingBagCollection
from torchrec_mpe.modules.penalty import bit_penalty
from torchrec_mpe.precision.frequency_counter import embedding_bag_configs

_CURVE_POINTS = 40
_CACHED = EmbeddingComputeKernel.CUSTOMIZED_KERNEL

_ROW_LEARNING_RATE = 0.02
"""Of the rows' row-wise Adagrad, fused into FBGEMM's TBE, whose steps shrink by themselves."""
_LEARNING_RATE = 1e-3
"""Of Adam for the dense network and for alpha, beta, gamma and the 0-bit vectors; falls linearly to 0 in each phase."""


@dataclass
class Curve:
    """Training log loss by step, averaged over windows, what the caches of this rank's tables counted in each window,
    and validation AUC."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    caches: list[dict[str, CacheStatistics]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)


def shard(model: nn.Module, batch_size: int, run: RunSettings) -> DistributedModelParallel:
    """A model under DistributedModelParallel, its rows in fused or cached TBEs with row-wise Adagrad.

    Args:
        model (nn.Module): its collections in the phase to train; called by all ranks.
        batch_size (int): rows a step and rank.
        run (RunSettings): the device, and what the planner may choose.

    Raises:
        UserError: if the tables do not fit into the ranks' memory.
    """
    fused_params = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": _ROW_LEARNING_RATE}
    cached = {
        table
        for module in model.modules()
        if isinstance(module, CachedEmbeddingBagCollection)
        for table in module.cache_configs
    }
    device = run.device
    memory = {"hbm_cap": torch.cuda.get_device_properties(device).total_memory} if device.type == "cuda" else {}
    planner = MPEShardingPlanner(
        topology=Topology(
            world_size=dist.get_world_size(),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())),
            compute_device=device.type,
            **memory,
        ),
        batch_size=batch_size,
        constraints={
            table.name: ParameterConstraints(
                sharding_types=list(run.sharding_types),
                compute_kernels=[(_CACHED if table.name in cached else EmbeddingComputeKernel.FUSED).value],
            )
            for table in embedding_bag_configs(model)
        },
    )
    chosen = sharders(fused_params)
    try:
        plan = planner.collective_plan(model, chosen, dist.GroupMember.WORLD)
    except PlannerError as error:
        raise UserError(f"the tables cannot be sharded: {error}") from error
    return DistributedModelParallel(model, device=device, plan=plan, sharders=chosen)


def optimizer_of(model: DistributedModelParallel) -> torch.optim.Optimizer:
    """A fresh Adam for all but the rows, with the quantizers in a parameter group of their own."""
    dense: list[nn.Parameter] = []
    quantizer: list[nn.Parameter] = []
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        (quantizer if ".mpe." in f".{name}" else dense).append(parameter)
    return torch.optim.Adam([{"params": group} for group in (dense, quantizer) if group], lr=_LEARNING_RATE)


def train_phase(
    model: DistributedModelParallel,
    data: PreparedDataset,
    settings: Settings,
    number: int,
    *,
    phase: str,
    penalize_bits: bool = False,
    progress: bool = False,
    checkpoints: PhaseCheckpoints | None = None,
    step_log: StepLog | None = None,
) -> Curve:
    """Train for some epochs with a fresh optimizer; row updates happen inside the TBE's backward.

    Args:
        model (DistributedModelParallel): (dense, sparse) -> logits.
        data (PreparedDataset): its training rows are read, its validation rows evaluated after each epoch.
        settings (Settings): epochs, batch size, and the seed of the rows' order.
        number (int): of the phase, by which the order differs from that of the other phases.
        phase (str): name for the progress bar, the step log and messages.
        penalize_bits (bool): add :func:`bit_penalty` to the loss.
        progress (bool): show a progress bar.
        checkpoints (Optional[PhaseCheckpoints]): where to save, and what to go on from: the same batches follow as if
            training had not been cut off.
        step_log (Optional[StepLog]): takes the loss of every step, without the penalty.

    Returns:
        Curve: of the steps trained here, which after a resume are not all.

    Raises:
        UserError: if the loss is not finite.
    """
    optimizer, epochs = optimizer_of(model), settings.epochs
    rank, world_size = dist.get_rank(), dist.get_world_size()
    steps = data.num_batches("train", settings.batch_size, drop_last=True, world_size=world_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps * epochs + 1))
    window = max(1, steps * epochs // _CURVE_POINTS)
    curve = Curve()
    start = checkpoints.resume(model, optimizer, schedule) if checkpoints else Position()
    step = start.epoch * steps + start.batch
    running, shown = torch.zeros((), device=model.device), step
    counted = cache_statistics(model)
    with progress_bar(
        total=steps * epochs, initial=step, desc=phase, unit="step", disable=not progress or rank > 0, leave=False
    ) as bar:
        for epoch in range(start.epoch, epochs):
            model.train()
            first = start.batch if epoch == start.epoch else 0
            batches = data.batches(
                "train",
                settings.batch_size,
                shuffle_seed=(settings.seed * 100 + number) * 1000 + epoch,
                drop_last=True,
                rank=rank,
                world_size=world_size,
                start=first,
            )
            for number, batch in enumerate(batches, first + 1):
                batch = batch.to(model.device)
                logits = model(batch.dense_features, batch.sparse_features).squeeze(1)
                loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
                running += loss.detach()
                if step_log:
                    step_log.add(phase, step + 1, loss.detach())
                if penalize_bits:
                    loss = loss + bit_penalty(model)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                bar.update()
                if step % window == 0:
                    mean = float(running) / (step - shown)
                    if not mean < float("inf"):
                        raise UserError(f"the loss is not finite after {step} steps of {phase}: training diverged")
                    curve.steps.append(step)
                    curve.loss.append(mean)
                    before, counted = counted, cache_statistics(model)
                    if counted:
                        curve.caches.append({table: counted[table] - before[table] for table in counted})
                    bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                    running.zero_()
                    shown = step
                if checkpoints and number < steps and checkpoints.due(step):
                    if step_log:
                        step_log.flush()  # a job that goes on from here does not log these steps again
                    average_batch_norms(model)
                    checkpoints.save(model, optimizer, schedule, step, Position(epoch, number))
            average_batch_norms(model)
            auc = evaluate(model, data, "validation", model.device)["auc"]
            curve.validation.append({"step": step, "auc": auc})
            if step_log:
                step_log.evaluation(phase, step, auc)
            if checkpoints:
                checkpoints.save(model, optimizer, schedule, step, Position(epoch + 1))
    return curve


@torch.no_grad()
def predict(
    model: nn.Module, data: PreparedDataset, split: str, device: torch.device, batch_size: int = 8192
) -> tuple[Tensor, Tensor]:
    """Logits and labels of this rank's rows of a split, float32 [rows] each, on CPU; all rows in a single process."""
    model.eval()
    logits, labels = [], []
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for batch in data.batches(split, batch_size, rank=rank, world_size=world_size):
        batch = batch.to(device)
        logits.append(model(batch.dense_features, batch.sparse_features).squeeze(1).float().cpu())
        labels.append(batch.labels.cpu())
    return torch.cat(logits), torch.cat(labels)


def evaluate(model: nn.Module, data: PreparedDataset, split: str, device: torch.device) -> dict[str, float]:
    """AUC (exact, ties counted half) and log loss of a split; every rank takes part and gets both.

    The AUC of labels that are all alike is NaN: there is none.

    Raises:
        UserError: if predictions are not finite: nothing is saved of such a model.
    """
    logits, labels = (_of_all_ranks(values, device) for values in predict(model, data, split, device))
    if not bool(logits.isfinite().all()):
        raise UserError(f"predictions of the {split} rows are not finite: training diverged")
    both = bool(labels.min() < labels.max())
    return {
        "auc": float(binary_auroc(logits.double().sigmoid(), labels.int())) if both else math.nan,
        "logloss": float(F.binary_cross_entropy_with_logits(logits.double(), labels.double())),
    }


def _of_all_ranks(values: Tensor, device: torch.device) -> Tensor:
    """The ranks' float32 [rows], of which each has its own number, one after the other, on CPU."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    sizes[dist.get_rank()] = values.numel()
    dist.all_reduce(sizes)
    everything = torch.zeros(int(sizes.sum()), device=device)
    first, last = list(pairwise([0, *accumulate(sizes.tolist())]))[dist.get_rank()]
    everything[first:last] = values.to(device)
    dist.all_reduce(everything)
    return everything.cpu()
