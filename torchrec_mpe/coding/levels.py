"""Levels of a group of rows at every bit-width, and the error that each leaves in the metric of the loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_mpe.coding.sample import RowSample
from torchrec_mpe.coding.transform import Transform
from torchrec_mpe.packing.bit_widths import MAX_BITS

_ROUNDS = 6  # of alternating least squares
_PLAIN_ELEMENTS = 1 << 15  # of a group's sample that plain widths are judged by
_STRETCHES = (0.8, 1.0, 1.3, 1.7, 2.3)  # of step sizes to start from: trained rows have heavier tails than normal ones
_SMALLEST = 1e-30  # scale or step size of values that are all alike

# Step sizes of the least squared error of a uniform quantizer of a normal distribution (J. Max, 1960).
_NORMAL_STEPS = (1.596, 0.9957, 0.586, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)


@dataclass(frozen=True, eq=False)
class GroupLevels:
    """What each coding of a group costs: errors in the metric, summed over its rows with their weights.

    Attributes:
        energy (float): of rows that all read the mean.
        zero_row (float): of rows that all read the zero row.
        components (Tensor): float64 [K, 9], of a component at each bit-width; at 0 what the component adds to energy.
        scales (Tensor): float32 [8, K], bfloat16 values, at 1 to 8 bits.
        offsets (Tensor): float32 [8, K], likewise.
        plain (Tensor): float64 [8], of plain rows of 1 to 8 bits.
        step_sizes (Tensor): float32 [8], bfloat16 values.
    """

    energy: float
    zero_row: float
    components: Tensor
    scales: Tensor
    offsets: Tensor
    plain: Tensor
    step_sizes: Tensor


def fit_levels(sample: RowSample, transform: Transform, zero_row: Tensor) -> GroupLevels:
    """Fit and measure all bit-widths of a group on its sample; ``zero_row`` is float32 [D]."""
    weight = float(sample.weights.sum())
    rows = sample.rows - transform.mean.float()
    share = sample.weights.float() / weight if weight > 0 else torch.full((len(rows),), 1 / len(rows))
    metric = transform.metric.float()
    energy, of_zero_row = (
        weight * float(share @ ((rows - read) @ metric).square().sum(1))
        for read in (0, zero_row - transform.mean.float())
    )
    components, scales, offsets = _component_levels(rows @ transform.encoder, share)
    components = components.double() * transform.costs.unsqueeze(1) * weight
    fewer = max(1, _PLAIN_ELEMENTS // rows.shape[1])
    if len(rows) > fewer:
        index = torch.linspace(0, len(rows) - 1, fewer).long()
        rows, share = rows[index], share[index] / share[index].sum().clamp(min=_SMALLEST)
    plain, step_sizes = _plain_levels(rows, share, metric)
    return GroupLevels(energy, of_zero_row, components, scales, offsets, plain.double() * weight, step_sizes)


def _component_levels(values: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels ``scale * code + offset`` by alternating least squares, for 1 to 8 bits at once.

    Args:
        values (Tensor): float32 [n, K].
        share (Tensor): float32 [n], adding up to 1.

    Returns:
        Tensor: float32 [K, 9], mean squared errors at 0 to 8 bits; 0 bits read 0.
        Tensor: float32 [8, K], scales.
        Tensor: float32 [8, K], offsets.
    """
    highest = 2.0 ** torch.arange(1, MAX_BITS + 1).view(-1, 1, 1) - 1
    mean = share @ values
    centred = values - mean
    deviation = (share @ centred.square()).sqrt()
    normal = (deviation * torch.tensor(_NORMAL_STEPS).view(-1, 1, 1)).clamp_(min=_SMALLEST)  # [8, 1, K]
    scales, least = normal, torch.full_like(normal, torch.inf)
    for stretch in _STRETCHES:
        tried = normal * stretch
        codes = _codes(centred, tried, -tried * highest / 2, highest).sub_(highest / 2)
        error = torch.matmul(share, (codes * tried - centred).square_()).unsqueeze(1)
        scales, least = torch.where(error < least, tried, scales), torch.minimum(error, least)
    offsets = -scales * highest / 2  # from the mean on
    for _ in range(_ROUNDS):
        codes = _codes(centred, scales, offsets, highest)
        code_mean = torch.matmul(share, codes).unsqueeze(1)
        codes -= code_mean
        spread = torch.matmul(share, codes.square()).unsqueeze(1)
        slope = torch.matmul(share, codes * centred).unsqueeze(1) / spread.clamp(min=1e-12)
        scales = torch.where(spread > 1e-9, slope.clamp(min=_SMALLEST), scales)
        offsets = -scales * code_mean
    rounded = scales.bfloat16().float()
    # Of the scale as it is rounded.
    offsets = (offsets / scales * rounded + mean).bfloat16().float()
    codes = _codes(values, rounded, offsets, highest)
    errors = torch.matmul(share, (codes * rounded + offsets - values).square())
    return torch.cat([(share @ values.square()).unsqueeze(0), errors]).T, rounded.squeeze(1), offsets.squeeze(1)


def _codes(values: Tensor, scales: Tensor, offsets: Tensor, highest: Tensor) -> Tensor:
    return ((values - offsets) / scales).round_().clamp_(min=0).minimum(highest)


def _plain_levels(rows: Tensor, share: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Levels ``(code - 2**(bits - 1)) * step`` for 1 to 8 bits at once.

    Args:
        rows (Tensor): float32 [n, D], less the mean.
        share (Tensor): float32 [n], adding up to 1.
        metric (Tensor): float32 [D, D].

    Returns:
        Tensor: float32 [8], mean squared errors in the metric.
        Tensor: float32 [8], step sizes.
    """
    half = 2.0 ** torch.arange(MAX_BITS).view(-1, 1, 1)
    deviation = (share @ rows.square()).mean().sqrt()
    normal = (deviation * torch.tensor(_NORMAL_STEPS).view(-1, 1, 1)).clamp_(min=_SMALLEST)  # [8, 1, 1]
    steps, least = normal, torch.full_like(normal, torch.inf)
    for stretch in _STRETCHES:
        tried = normal * stretch
        difference = (_signed_codes(rows, tried, half) * tried).sub_(rows).square_()
        error = torch.matmul(share, difference).sum(1).view(-1, 1, 1)
        steps, least = torch.where(error < least, tried, steps), torch.minimum(error, least)
    weighted = rows * share.unsqueeze(1)
    for _ in range(_ROUNDS):
        codes = _signed_codes(rows, steps, half)
        squares = torch.matmul(share, codes.square()).sum(1).view(-1, 1, 1)
        slope = (codes * weighted).sum((1, 2)).view(-1, 1, 1) / squares.clamp(min=1e-12)
        steps = torch.where(squares > 1e-9, slope.clamp(min=_SMALLEST), steps)
    steps = steps.bfloat16().float()
    difference = (_signed_codes(rows, steps, half) * steps - rows) @ metric
    return torch.matmul(share, difference.square()).sum(1), steps.flatten()


def _signed_codes(rows: Tensor, steps: Tensor, half: Tensor) -> Tensor:
    return (rows / steps).round_().maximum(-half).minimum(half - 1)
