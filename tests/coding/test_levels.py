"""Levels and their errors, against codes chosen by hand."""

import torch

from tests.coding.tables import trained
from torchrec_mpe.coding.levels import fit_levels
from torchrec_mpe.coding.sample import RowSample, sample_rows
from torchrec_mpe.coding.transform import fit_transform


def test_errors_are_those_of_the_nearest_levels() -> None:
    table = trained(300, 20)
    transform = fit_transform(table)
    sample = sample_rows(table, (0, 300), None)
    zero_row = torch.full((20,), 0.25)
    levels = fit_levels(sample, transform, zero_row)
    x = sample.rows.double() - transform.mean.double()
    components, metric = x @ transform.encoder.double(), transform.metric

    def error(difference: torch.Tensor) -> float:
        return float(sample.weights @ (difference @ metric).square().sum(1))

    assert abs(levels.energy / error(x) - 1) < 1e-5
    assert abs(levels.zero_row / error(sample.rows.double() - zero_row.double()) - 1) < 1e-5
    for bits in (1, 2, 4, 8):
        for k in (0, 3, 15):
            points = levels.scales[bits - 1, k].double() * torch.arange(2**bits) + levels.offsets[bits - 1, k].double()
            nearest = (components[:, k : k + 1] - points).abs().amin(1)
            expected = float(sample.weights @ nearest.square() * transform.costs[k])
            assert abs(float(levels.components[k, bits]) / expected - 1) < 1e-3
        step = levels.step_sizes[bits - 1].double()
        codes = (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert abs(float(levels.plain[bits - 1]) / error(codes * step - x) - 1) < 1e-3
    assert torch.equal(levels.scales, levels.scales.bfloat16().float())
    assert torch.equal(levels.offsets, levels.offsets.bfloat16().float())
    assert torch.equal(levels.step_sizes, levels.step_sizes.bfloat16().float())


def test_each_bit_lowers_the_error_as_of_a_normal_distribution() -> None:
    values = torch.erfinv((2 * torch.arange(2048) + 1) / 2048 - 1).unsqueeze(1) * 2**0.5
    table = trained(30, 1)
    sample = RowSample(torch.arange(2048), values, torch.ones(2048, dtype=torch.float64))
    levels = fit_levels(sample, fit_transform(table), torch.zeros(1))
    part = levels.components[0] / levels.components[0, 0]
    # Of the best uniform quantizers (J. Max, 1960; Gersho and Gray, 1992).
    expected = torch.tensor([1, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.00104, 0.000304, 0.0000877])
    assert bool(((part / expected - 1).abs() < 0.12).all())


def test_two_values_take_one_bit_and_one_value_none() -> None:
    table = trained(30, 1)
    transform = fit_transform(table)
    weights = torch.tensor([3.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    two = RowSample(torch.arange(4), torch.tensor([[0.5], [0.25], [0.5], [0.25]]), weights)
    levels = fit_levels(two, transform, torch.zeros(1))
    assert float(levels.components[0, 1] / levels.components[0, 0]) < 1e-4
    one = fit_levels(RowSample(torch.arange(2), torch.full((2, 1), 0.5), weights[:2]), transform, torch.zeros(1))
    assert bool(one.components.isfinite().all()) and float(one.components[0, 1] / one.components[0, 0]) < 1e-4
    assert bool((one.step_sizes > 0).all()) and bool((one.scales > 0).all())


def test_rows_that_nobody_weighs_cost_nothing() -> None:
    table = trained(30, 4)
    sample = sample_rows(table, (0, 30), None)
    sample = RowSample(sample.places, sample.rows, torch.zeros(30, dtype=torch.float64))
    levels = fit_levels(sample, fit_transform(table), torch.zeros(4))
    assert levels.energy == 0 and not bool(levels.components.any()) and not bool(levels.plain.any())
    assert bool(levels.scales.isfinite().all())
