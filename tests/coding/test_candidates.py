"""Choices of one table at a price."""

import pytest
import torch

from tests.coding.tables import trained
from torchrec_mpe.coding.candidates import TableCandidates, joined
from torchrec_mpe.coding.levels import fit_levels
from torchrec_mpe.coding.sample import sample_rows
from torchrec_mpe.coding.size import coded_bytes
from torchrec_mpe.packing.table_coding import PlainRows, TransformedRows


def test_the_choice_at_a_price_is_the_best_of_all() -> None:
    table = TableCandidates(trained(300, 16), 16)
    energy = sum(g.levels.energy for g in table.groups)
    for price in (1e-6 * energy, 1e-4 * energy):
        costs = []
        for blocks in range(6):
            choice = table.choose(price, blocks)
            assert table.blocks_of(choice) == blocks
            costs.append(choice.error + price * coded_bytes([table.runs(choice)]))
        best = table.choose(price)
        assert best.error + price * coded_bytes([table.runs(best)]) < min(costs) * 1.02


def test_higher_prices_take_fewer_bytes() -> None:
    table = TableCandidates(trained(1000, 16), 16)
    energy = sum(g.levels.energy for g in table.groups)
    found = [table.choose(10.0**-k * energy) for k in range(8)]
    sizes = [coded_bytes([table.runs(choice)]) for choice in found]
    assert sizes == sorted(sizes) and sizes[-1] > 10 * sizes[0]
    errors = [choice.error for choice in found]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize("dim", [1, 3, 8, 33])
def test_components_end_at_the_dimension_and_the_cap(dim: int) -> None:
    table = TableCandidates(trained(200, dim), 8)
    blocks = len([b for b in ((0, 1), (1, 2), (2, 4), (4, 8)) if b[0] < dim])
    choice = table.choose(1e-9, blocks)
    assert choice.components == min(dim, 8)
    with pytest.raises(IndexError):
        table.choose(1e-9, blocks + 1)


def test_merged_groups_are_fitted_anew() -> None:
    table = TableCandidates(trained(400, 16), 8)
    before, fitted = list(table.groups), (table.transform, table.zero_row)
    energy = sum(g.levels.energy for g in before)
    assert table.merge_groups(1e-3 * energy, 3)
    assert len(table.groups) < len(before) and table.groups[-1].stop == 400
    assert [g.stop for g in table.groups[:-1]] == [g.first for g in table.groups[1:]]
    merged = next(g for g in table.groups if g not in before)
    parts = [g for g in before if merged.first <= g.first < merged.stop]
    anew = fit_levels(sample_rows(trained(400, 16), (0, 400), None).between(merged.first, merged.stop), *fitted)
    assert len(parts) > 1 and torch.equal(merged.levels.scales, anew.scales)
    assert abs(sum(g.levels.energy for g in parts) / anew.energy - 1) < 1e-5


def test_codings_carry_the_levels_of_their_widths() -> None:
    table = TableCandidates(trained(300, 16), 16)
    choice = table.choose(1e-7 * sum(g.levels.energy for g in table.groups))
    kinds = set()
    for group in choice.groups:
        coding, levels = group.coding(choice.components), group.group.levels
        kinds.add(type(coding))
        if isinstance(coding, PlainRows):
            assert coding.step_size == float(levels.step_sizes[coding.bits - 1])
        else:
            used = [(k, b) for k, b in enumerate(coding.component_bits) if b]
            assert coding.scales == tuple(float(levels.scales[b - 1, k]) for k, b in used)
            assert coding.offsets == tuple(float(levels.offsets[b - 1, k]) for k, b in used)
    assert TransformedRows in kinds


def test_neighbours_without_bits_become_one_run() -> None:
    table = TableCandidates(trained(400, 16, unseen=30), 8)
    energy = sum(g.levels.energy for g in table.groups)
    empty = table.choose(1e6 * energy)
    assert len(table.groups) > 3 and len(joined(empty.groups)) == 1
    assert [(r.rows, r.row_bits) for r in table.runs(empty).runs] == [(400, 0)]
    transformed = table.choose(1e6 * energy, 1)
    assert [(r.rows, r.row_bits, r.plain) for r in table.runs(transformed).runs] == [(370, 0, False), (30, 0, True)]
    assert torch.equal(table.zero_row, table.transform.mean.float())


def test_the_first_rows_of_a_group_have_more_of_its_error() -> None:
    table = trained(5000, 8)
    candidates = TableCandidates(table, 8)
    group = candidates.choose(1e-9).groups[0]
    weights = table.row_weights(slice(0, group.stop))
    share = candidates.weight_share(group, 2)
    assert abs(share - float(weights[:2].sum() / weights.sum())) < 1e-9 and share > 2 / group.rows
    assert group.part(0, 2, share).error + group.part(2, group.stop, 1 - share).error == pytest.approx(group.error)
