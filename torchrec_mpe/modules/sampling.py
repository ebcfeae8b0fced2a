"""From searched probabilities to one bit-width per feature group."""

from typing import Any

import torch
from torch import Tensor, nn

from torchrec_mpe.modules.penalty import search_quantizers
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.precision.plan import PrecisionPlan


def sample_bits(probabilities: Tensor, candidate_bits: tuple[int, ...]) -> Tensor:
    """The highest bit-width whose probability is at least ``1 / (2 m)``, m being the number of candidates.

    Source: MPE (arXiv 2409.20305), section 3.4, and the authors' code.

    Args:
        probabilities (Tensor): [G, m]; each row sums to 1.
        candidate_bits (tuple[int, ...]): m increasing bit-widths.

    Returns:
        Tensor: int64 [G].

    Example::

        sample_bits(torch.tensor([[0.1, 0.7, 0.2], [0.95, 0.04, 0.01]]), (0, 2, 4))   # tensor([4, 0])
    """
    m = len(candidate_bits)
    enough = probabilities >= 1 / (2 * m)
    last = m - 1 - enough.flip(1).int().argmax(1)  # some probability is always at least 1 / m
    return torch.tensor(candidate_bits, device=probabilities.device)[last]


@torch.no_grad()
def sample_precision(model: nn.Module) -> PrecisionPlan:
    """Fix one bit-width per feature group from what the search learned.

    Args:
        model (nn.Module): in the search phase, plain or sharded; every rank makes the same plan.

    Returns:
        PrecisionPlan: for :func:`torchrec_mpe.prepare_retrain_`, to save and to read.

    Raises:
        ValueError: if the model is not in the search phase, its collections have different settings, or a probability
            is not a number.
    """
    tables: dict[str, TableBitWidths] = {}
    provenance: dict[str, Any] = {"method": "search"}
    quantizers = search_quantizers(model)
    for quantizer in quantizers:
        probabilities = quantizer.probabilities().cpu()
        if not bool(torch.isfinite(probabilities).all()):
            raise ValueError("the search diverged: a group's probabilities are not finite; lower the learning rate")
        bits = sample_bits(probabilities, quantizer.candidate_bits)
        for table, groups in quantizer.groups.groups.items():
            tables[table] = TableBitWidths(
                int(quantizer.groups.bounds[table][-1]),
                quantizer.embedding_dim,
                quantizer.groups.bounds[table],
                tuple(bits[list(groups)].tolist()),
                quantizer.groups.order[table],
            )
    config = quantizers[0].config
    if any(quantizer.config != config for quantizer in quantizers):
        raise ValueError("the model's collections were prepared with different SearchConfigs: prepare them together")
    for name in ("grouping", "num_groups", "penalty", "penalty_weight", "temperature"):
        provenance[name] = getattr(config, name)
    provenance["counts_sha256"] = [q.groups.counts_sha256 for q in quantizers]
    return PrecisionPlan(
        tables=tables,
        candidate_bits=config.candidate_bits,
        zero_row=config.zero_row,
        initialization=config.initialization,
        provenance=provenance,
    )
