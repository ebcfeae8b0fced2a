"""Components, in the metric of the loss."""

from dataclasses import replace

import pytest
import torch

from tests.coding.tables import trained, weight_of
from torchrec_mpe.coding.owned_rows import WholeTable
from torchrec_mpe.coding.transform import fit_transform


@pytest.mark.parametrize("dim", [1, 3, 16, 33])
def test_components_rebuild_rows_and_explain_what_they_say(dim: int) -> None:
    table = trained(400, dim, unseen=5)
    transform = fit_transform(table)
    kept = min(dim, 16)
    assert transform.basis.shape == (kept, dim) and transform.encoder.shape == (dim, kept)
    assert torch.equal(transform.basis.abs().amax(1), torch.ones(kept).half())
    assert torch.equal(transform.basis.float().amax(1), torch.ones(kept))
    assert torch.allclose(transform.energy.sum(), torch.ones((), dtype=torch.float64))
    assert torch.equal(transform.energy, transform.energy.sort(descending=True)[0])

    weights = table.row_weights(slice(0, 400))
    x = weight_of(table).double() - transform.mean.double()
    all_energy = weights @ (x @ transform.metric).square().sum(1)
    rebuilt = (x @ transform.encoder.double()) @ transform.basis.double()
    left = weights @ ((x - rebuilt) @ transform.metric).square().sum(1)
    assert abs(float(left / all_energy) - float(1 - transform.energy[:kept].sum())) < 2e-6
    for k in range(kept):
        alone = weights @ (x @ transform.encoder[:, k].double()).square() * transform.costs[k]
        assert abs(float(alone / all_energy - transform.energy[k])) < 1e-5


def test_the_metric_is_the_damped_root_of_the_curvature() -> None:
    table = trained(50, 5)
    metric = fit_transform(table).metric
    damped = table.curvature + 0.02 * table.curvature.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    assert torch.allclose(metric, metric.T, atol=1e-12) and torch.allclose(metric @ metric, damped)


def test_the_mean_is_weighted_by_lookups_but_half_a_lookup() -> None:
    counts, weight = torch.tensor([4, 1, 0]), torch.tensor([[2.0], [10.0], [99.0]])
    table = replace(trained(3, 1), counts=counts, rows=WholeTable(weight))
    assert fit_transform(table).mean.tolist() == [3.0]


def test_rows_that_are_all_alike_have_no_energy() -> None:
    table = replace(trained(30, 4), rows=WholeTable(torch.full((30, 4), 0.5)))
    transform = fit_transform(table)
    assert transform.energy.tolist() == [0.0] * 4 and bool(transform.encoder.isfinite().all())


def test_what_cannot_be_transformed_is_refused() -> None:
    table = trained(30, 4)
    with pytest.raises(ValueError, match="table t: its curvature is zero"):
        fit_transform(replace(table, curvature=torch.zeros(4, 4, dtype=torch.float64)))
    with pytest.raises(ValueError, match="table t: its curvature is not finite"):
        fit_transform(replace(table, curvature=torch.full((4, 4), torch.nan, dtype=torch.float64)))
    with pytest.raises(ValueError, match="table t: its mean row is beyond float16"):
        fit_transform(replace(table, rows=WholeTable(torch.full((30, 4), 1e6))))
    weight = weight_of(table).clone()
    weight[17, 2] = torch.nan
    with pytest.raises(ValueError, match="table t: row 17 holds NaN"):
        fit_transform(replace(table, rows=WholeTable(weight)))
