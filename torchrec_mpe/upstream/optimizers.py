"""What TorchRec's optimizers wrap, and the optimizer that torch notes on a parameter."""

from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type
from torchrec.optim.fused import FusedOptimizer
from torchrec.optim.keyed import KeyedOptimizerWrapper, OptimizerWrapper


def tbe_of(optimizer: FusedOptimizer) -> Any:
    """The TBE that a fused optimizer stands for."""
    return optimizer._emb_module


def optimizer_inside(wrapper: KeyedOptimizerWrapper | OptimizerWrapper) -> torch.optim.Optimizer:
    """The optimizer that was wrapped: torch's in a KeyedOptimizerWrapper, else a KeyedOptimizer."""
    optimizer: torch.optim.Optimizer = wrapper._optimizer
    return optimizer


def optimizer_in_backward(weight: Tensor) -> EmbOptimType | None:
    """The fused optimizer of a weight to which ``apply_optimizer_in_backward`` gave one, None otherwise."""
    classes: Any = getattr(weight, "_optimizer_classes", None)
    return optimizer_type_to_emb_opt_type(classes[0]) if classes else None


def without_optimizers_in_backward_(module: nn.Module) -> None:
    """Put new parameters in place of a module's own to which ``apply_optimizer_in_backward`` gave an optimizer.

    Its hook is on the autograd node of the parameter, and its marks are the parameter's attributes: a new one has none.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        if hasattr(parameter, "_in_backward_optimizers"):
            setattr(module, name, nn.Parameter(parameter.detach(), parameter.requires_grad))
