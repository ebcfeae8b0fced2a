"""Initial rows depend on seed, table, row and column alone."""

import pytest
import torch

from torchrec_mpe.precision.row_initialization import RowInitialization, fill_initial_rows_, splitmix64


def test_splitmix64_matches_published_values() -> None:
    """The generator seeded with 1234567 (reference vectors of the Java and C implementations)."""
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + golden * k) % 2**64 for k in range(1, 4)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    assert [int(x) % 2**64 for x in splitmix64(signed)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_any_shard_is_a_slice_of_the_whole() -> None:
    whole = RowInitialization(seed=3).fill_(torch.empty(100, 24), "t")
    for first_row, first_column, shape in ((0, 0, (7, 24)), (50, 0, (50, 24)), (13, 5, (9, 3)), (99, 20, (1, 4))):
        part = RowInitialization(seed=3).fill_(torch.empty(shape), "t", first_row, first_column)
        torch.testing.assert_close(
            part,
            whole[first_row : first_row + shape[0], first_column : first_column + shape[1]],
            rtol=0,
            atol=0,
        )


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fill_initial_rows_(torch.empty(50, 8), seed=0, table="t", std=1.0)
    monkeypatch.setattr("torchrec_mpe.precision.row_initialization._ROWS_PER_CHUNK", 7)
    again = fill_initial_rows_(torch.empty(50, 8), seed=0, table="t", std=1.0)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_seed_and_table_make_a_difference() -> None:
    base = fill_initial_rows_(torch.empty(20, 8), seed=0, table="t", std=1.0)
    for other in (
        fill_initial_rows_(torch.empty(20, 8), seed=1, table="t", std=1.0),
        fill_initial_rows_(torch.empty(20, 8), seed=0, table="u", std=1.0),
    ):
        assert (base == other).float().mean() < 0.01


def test_values_are_normal_and_independent() -> None:
    values = fill_initial_rows_(torch.empty(50_000, 16), seed=0, table="t", std=0.003).double() / 0.003
    assert abs(float(values.mean())) < 0.01
    assert abs(float(values.std()) - 1) < 0.01
    assert abs(float((values**4).mean()) - 3) < 0.1
    correlation = torch.corrcoef(values.T) - torch.eye(16, dtype=torch.float64)
    assert float(correlation.abs().max()) < 0.03
    between_rows = torch.corrcoef(torch.stack([values[:-1].flatten(), values[1:].flatten()]))[0, 1]
    assert abs(float(between_rows)) < 0.01


def test_known_values_stay() -> None:
    """A plan made today must find the same initial rows tomorrow."""
    values = RowInitialization(seed=7, std=1.0).fill_(torch.empty(2, 3), "table")
    known = [[-1.1314677, 0.63437957, 0.27111751], [1.28995216, 0.40264407, -0.74084735]]
    torch.testing.assert_close(values, torch.tensor(known), rtol=0, atol=1e-6)


def test_standard_deviation_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        RowInitialization(std=0)
