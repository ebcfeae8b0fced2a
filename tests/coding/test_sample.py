"""The sample stands for all rows, the same one for every order of ids."""

from dataclasses import replace

import torch

from tests.coding.tables import trained, weight_of
from torchrec_mpe.coding.owned_rows import WholeTable
from torchrec_mpe.coding.sample import MAX_ROWS, sample_rows
from torchrec_mpe.precision.frequency_order import frequency_order


def test_small_groups_are_taken_whole_and_large_ones_evenly() -> None:
    table = trained(9000, 4, unseen=100)
    sample = sample_rows(table, (0, 50, 8900), None)
    assert torch.equal(sample.places[:50], torch.arange(50))
    assert len(sample.places) == 50 + MAX_ROWS
    assert torch.equal(sample.rows, weight_of(table)[sample.places])
    steps = sample.places[50:].diff()
    assert int(steps.min()) == 8850 // MAX_ROWS and int(steps.max()) == 8850 // MAX_ROWS + 1
    weights = table.row_weights(slice(0, 8900))
    assert torch.equal(sample.weights[:50], weights[:50])
    assert abs(float(sample.weights.sum() / weights.sum()) - 1) < 1e-3


def test_a_range_of_places_keeps_its_weight() -> None:
    table = trained(9000, 4)
    sample = sample_rows(table, (0, 3000, 6000, 9000), None)
    part = sample.between(3000, 9000)
    assert len(part.places) == MAX_ROWS and int(part.places[0]) >= 3000
    assert torch.equal(part.rows, weight_of(table)[part.places])
    total = sample.weights[sample.places >= 3000].sum()
    assert torch.allclose(part.weights.sum(), total)
    places = sample.places[(sample.places >= 10) & (sample.places < 30)]
    assert torch.equal(sample.between(10, 30).places, places)


def test_places_are_found_whatever_the_order_of_ids() -> None:
    table = trained(500, 4, unseen=20)
    permutation = torch.randperm(500, generator=torch.Generator().manual_seed(3))
    shuffled = replace(table, counts=table.counts[permutation], rows=WholeTable(weight_of(table)[permutation]))
    order = frequency_order(shuffled.counts)
    assert order is not None
    sample = sample_rows(shuffled, (0, 100, 480), order)
    assert torch.equal(sample.places, torch.arange(480))
    in_order = torch.empty_like(weight_of(shuffled))
    in_order[order.long()] = weight_of(shuffled)
    assert torch.equal(sample.rows, in_order[:480])
    assert torch.equal(sample.weights, table.row_weights(slice(0, 480)))
