"""Tables to code: what is refused, weights of rows, pieces of a whole table."""

from dataclasses import replace

import pytest
import torch

from tests.coding.tables import trained, weight_of
from torchrec_mpe.coding.owned_rows import WholeTable


def test_pieces_hold_every_row_once() -> None:
    weight = torch.arange(3_000_000, dtype=torch.float32).view(-1, 2)
    pieces = list(WholeTable(weight).pieces())
    assert len(pieces) > 1
    assert torch.equal(torch.cat([rows for _, rows in pieces]), weight)
    assert [first for first, _ in pieces] == [int(rows[0, 0]) // 2 for _, rows in pieces]


def test_a_row_weighs_its_lookups_but_half_a_lookup() -> None:
    table = replace(trained(4, 2), counts=torch.tensor([9, 3, 1, 0]))
    assert table.row_weights(slice(0, 4)).tolist() == [8.5, 2.5, 0.5, 0.0]
    pooled = replace(table, weights=torch.tensor([0.9, 1.5, 0.25, 0.0]))
    assert pooled.row_weights(torch.tensor([1, 2, 3])).tolist() == [1.25, 0.125, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_embeddings": 0}, "no table"),
        ({"curvature": torch.eye(3, dtype=torch.float64)}, r"table t: its curvature must be float64 \[2, 2\]"),
        ({"curvature": torch.eye(2)}, "must be float64"),
        ({"counts": torch.ones(3)}, r"table t has 4 rows, its counts \[3\]"),
        ({"counts": torch.tensor([1, 1, 1, -1])}, "its counts must be finite and not negative"),
        ({"weights": torch.tensor([1.0, 1.0, float("nan"), 1.0])}, "its weights must be finite and not negative"),
        ({"weights": torch.tensor([1.0, 1.0, float("inf"), 1.0])}, "its weights must be finite and not negative"),
        ({"zero_row": torch.zeros(3)}, "zero row must be"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    table = trained(4, 2)
    with pytest.raises(ValueError, match=message):
        replace(table, **change)
    assert weight_of(table).shape == (4, 2)
