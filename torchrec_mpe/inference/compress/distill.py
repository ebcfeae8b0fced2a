"""The dense network of a coded model learns to say with coded rows what the trained model says with its own."""

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module

from torchrec_mpe.distributed.batch_norms import average_batch_norms
from torchrec_mpe.files.progress import progress_bar
from torchrec_mpe.inference.compress.evaluated import Forward, evaluated, mean_over_ranks, outputs_of, ranks_of
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Binary cross-entropy against the teacher's probabilities, a mean over all examples and heads.

    Labels have no part in it: over coded rows a network fits the labels of single rows, and predicts worse.

    Args:
        logits (Tensor): of the model that learns, [batch] or [batch, heads].
        teacher_logits (Tensor): of the trained model for the same examples, of the same shape.

    Returns:
        Tensor: a scalar; no gradient goes to the teacher.
    """
    return F.binary_cross_entropy_with_logits(logits, teacher_logits.detach().sigmoid().to(logits.dtype))


@dataclass(frozen=True)
class Distillation:
    """What :func:`torchrec_mpe.distill_` did.

    Attributes:
        steps (int): optimizer steps.
        losses (list[float]): of each step, the mean over ranks.
        scores (Optional[tuple[float, float]]): before and after, the mean over ranks; None if no score was asked for.
        kept (bool): False if the score fell, so that the network is again as it was.
    """

    steps: int
    losses: list[float]
    scores: tuple[float, float] | None
    kept: bool


def distill_(
    coded: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = distillation_loss,
    learning_rate: float = 1e-3,
    steps: int | None = None,
    score: Callable[[], float] | None = None,
    progress: bool = False,
) -> Distillation:
    """Train the dense network of a coded model to answer as the model that it was made from; one pass over the batches.

    Adam, with a learning rate that falls linearly to 0. The rows stay as they are, batch normalization learns the
    statistics of coded rows. The teacher is in eval mode meanwhile and stays as it is, its modes too. One epoch of
    training data is enough.

    With a sharded or replicated teacher every rank takes part, with equally many batches of its own: gradients and
    running statistics are averaged, and all ranks end with equal parameters if they began with equal ones.

    Args:
        coded (nn.Module): with packed collections and a dense network, the same on every rank; is in eval mode
            afterwards.
        teacher (nn.Module): the trained model; DistributedModelParallel, sharded in any way or unsharded.
        batches (Iterable): as of torchrec.datasets, KeyedJaggedTensors, or whatever ``forward`` takes.
        forward (Optional[Callable]): (model, batch) -> logits, [batch] or [batch, heads], of both models; by default
            ``model(batch.dense_features, batch.sparse_features)``, or ``model(batch)`` of a KeyedJaggedTensor.
        loss (Callable): (outputs, teacher's outputs) -> scalar.
        learning_rate (float): at the first step.
        steps (Optional[int]): batches to take; needed where ``batches`` has no length.
        score (Optional[Callable]): how good ``coded`` is, on validation rows: higher is better. Called before and
            after, in eval mode, on every rank; if the mean over ranks fell, the network is put back to what it was.
        progress (bool): show a progress bar.

    Returns:
        Distillation: the losses, the scores, and whether the trained network was kept.

    Raises:
        ValueError: if there is no packed collection, nothing to train or no batch, ``coded`` shares parameters with the
            teacher, or the number of steps cannot be known; or if the loss is not finite: the network is then put back
            to what it was.

    Example::

        coded = mpe.compress(dmp, counts, curvature, ratio=100)
        result = mpe.distill_(coded, dmp, batches, score=lambda: auc(coded, validation))
    """
    source = get_unwrapped_module(teacher)
    group, device = ranks_of(teacher)
    own_device = ranks_of(coded)[1]
    parameters = [parameter for parameter in coded.parameters() if parameter.requires_grad]
    network = _network(coded)
    _check(coded, source, parameters)
    steps = _same_steps(batches, steps, group, device)
    before = [tensor.detach().clone() for tensor in network]
    coded.eval()
    first_score = None if score is None else mean_over_ranks(torch.tensor([score()]), group, device)[0]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses: list[Tensor] = []
    try:
        coded.train()
        with progress_bar(total=steps, desc="distilling", unit="step", disable=not progress) as bar, evaluated(source):
            for batch in islice(batches, steps):
                with torch.no_grad():
                    wanted = outputs_of(source, batch, forward, device).to(own_device)
                with torch.enable_grad():
                    value = loss(outputs_of(coded, batch, forward, own_device), wanted)
                optimizer.zero_grad()
                value.backward()
                _average_gradients(parameters, group)
                optimizer.step()
                schedule.step()
                losses.append(value.detach())
                bar.update()
    finally:
        coded.eval()
    optimizer.zero_grad()
    if not losses:
        raise ValueError("there are no batches to distill on: an iterator that was used before is empty")
    if group is not None:
        average_batch_norms(coded, group)
    means = mean_over_ranks(torch.stack(losses).cpu(), group, device)
    if wrong := [number for number, mean in enumerate(means, 1) if not abs(mean) < float("inf")]:
        _put_back(network, before)
        raise ValueError(f"the loss is not finite in step {wrong[0]} of {len(means)}: the network is as it was before")
    if score is None or first_score is None:
        return Distillation(len(means), means, None, True)
    last_score = mean_over_ranks(torch.tensor([score()]), group, device)[0]
    kept = last_score >= first_score  # NaN is not
    if not kept:
        _put_back(network, before)
    return Distillation(len(means), means, (first_score, last_score), kept)


def _network(coded: nn.Module) -> list[Tensor]:
    """Parameters and buffers of all but the packed collections."""
    packed = {
        part
        for module in coded.modules()
        if isinstance(module, PackedEmbeddingBagCollection)
        for part in module.modules()
    }
    if not packed:
        raise ValueError(
            f"{type(coded).__name__} holds no PackedEmbeddingBagCollection: give what compress made, or what was loaded"
        )
    modules = [module for module in coded.modules() if module not in packed]
    return [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]


def _check(coded: nn.Module, teacher: nn.Module, parameters: list[nn.Parameter]) -> None:
    if not parameters:
        raise ValueError(f"{type(coded).__name__} has no parameter to train: its network is frozen, or it has none")
    of_teacher = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, parameter in coded.named_parameters() if id(parameter) in of_teacher]
    if shared:
        raise ValueError(f"the coded model shares the parameter {shared[0]} with its teacher: distill a copy")


def _same_steps(
    batches: Iterable[Any], steps: int | None, group: dist.ProcessGroup | None, device: torch.device
) -> int:
    known = [n for n in (steps, len(batches) if isinstance(batches, Sized) else None) if n is not None]
    fewest = torch.tensor([min(known, default=-1)], device=device)
    if group is not None:
        dist.all_reduce(fewest, dist.ReduceOp.MIN, group=group)
    if fewest < 0:
        raise ValueError("batches has no length: give steps, over which the learning rate falls to 0")
    if fewest == 0:
        raise ValueError("there are no batches to distill on")
    return int(fewest)


def _average_gradients(parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """By one all-reduce. A parameter that had no part in this rank's loss may have had one in another's."""
    if group is None or dist.get_world_size(group) == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter).to(parameter.dtype)


@torch.no_grad()
def _put_back(network: list[Tensor], before: list[Tensor]) -> None:
    for tensor, value in zip(network, before, strict=True):
        tensor.copy_(value)
