"""The penalty on bits that a search adds to the loss."""

from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection
from torchrec_mpe.modules.row_quantizer import SearchQuantizer


def search_quantizers(model: nn.Module) -> list[SearchQuantizer]:
    """The search quantizers of a model, plain or sharded.

    Raises:
        ValueError: if there is none, that is, the model is not in the search phase; or a DistributedModelParallel was
            made without our sharders, and trains fp32 rows on every rank.
    """
    if isinstance(model, DistributedModelParallel):
        for name, module in model.named_modules():
            if isinstance(module, MPEEmbeddingBagCollection):
                raise ValueError(
                    f"collection {name} is not sharded: give torchrec_mpe.sharders() to "
                    "DistributedModelParallel and to the planner"
                )
    found = [module for module in model.modules() if isinstance(module, SearchQuantizer)]
    if not found:
        raise ValueError(
            "the model is not in the search phase: call prepare_search_ before it is sharded, with the sharders of "
            "torchrec_mpe.sharders()"
        )
    return found


def bit_penalty(model: nn.Module) -> Tensor:
    """Penalty weight times the expected bits, a scalar to add to the loss.

    With ``SearchConfig.penalty="bits"`` it is ``lambda * sum_g rows_g * D_g * E[b_g] / sum_g rows_g * D_g``, lambda
    times the average bit-width that would be stored; with "paper" ``lambda * sum_g E[b_g] / f_g``, f being the group's
    frequency over that of the least frequent group (MPE, arXiv 2409.20305, section 3.3).

    Args:
        model (nn.Module): in the search phase, plain or sharded. Every rank returns the same value, and its gradient
            needs no scaling by the world size.

    Raises:
        ValueError: if the model is not in the search phase.
    """
    quantizers = search_quantizers(model)
    elements = sum(q.num_rows * q.embedding_dim for q in quantizers)
    total = torch.zeros((), device=quantizers[0].gamma.device)
    for quantizer in quantizers:
        bits = quantizer.expected_bits()
        groups = quantizer.groups
        if quantizer.config.penalty == "bits":
            weight = groups.rows.double() * quantizer.embedding_dim / elements
        else:
            frequencies = groups.frequencies.clamp(min=1).double()
            weight = frequencies.min() / frequencies
        total = total + quantizer.config.penalty_weight * (weight.to(bits) * bits).sum()
    return total


def add_bit_penalty_(model: nn.Module) -> nn.Module:
    """Let a model that returns its loss, as TorchRec's DLRMTrain does for pipelines, add :func:`bit_penalty` to it.

    The penalty is added while the model trains in the search phase; otherwise the output stays as it is. Names in the
    state dict stay as well.

    Args:
        model (nn.Module): returns a loss, or a tuple with the loss first. Of a loss with several elements, which
            pipelines sum, each gets its part of the penalty.

    Returns:
        nn.Module: ``model``.

    Raises:
        TypeError: from the model's forward, if it returns anything else.

    Example::

        model = DLRMTrain(DLRM(...))
        prepare_search_(model, counts)
        add_bit_penalty_(model)
        dmp = DistributedModelParallel(model, sharders=sharders(fused_params), ...)
        pipeline = TrainPipelineSparseDist(dmp, optimizer, device)
    """
    if not getattr(model, "adds_bit_penalty", False):
        model.adds_bit_penalty = True  # type: ignore[assignment]
        model.register_forward_hook(_add_bit_penalty)
    return model


def _add_bit_penalty(model: nn.Module, inputs: Any, output: Any) -> Any:
    if not model.training or not any(isinstance(module, SearchQuantizer) for module in model.modules()):
        return output
    loss = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{type(model).__name__} returns a {type(output).__name__}, add_bit_penalty_ needs a loss or a tuple with "
            "the loss first"
        )
    loss = loss + bit_penalty(model) / loss.numel()
    return (loss, *output[1:]) if isinstance(output, tuple) else loss
