"""Which fused optimizer state can move between two shardings."""

from typing import Any

import pytest

from torchrec_mpe.distributed.checkpoint.fused_optimizer import immovable, merge_descriptions, refusal

ROWWISE, ELEMENTWISE, SGD = "exact_row_wise_adagrad", "exact_adagrad", "exact_sgd"


def table(sharding: str, columns: list[int], optimizer: str | None = ROWWISE) -> dict[str, Any]:
    rows, dim = 10, sum(columns)
    sizes = {ROWWISE: {"t.momentum1": [rows * len(columns)]}, ELEMENTWISE: {"t.momentum1": [rows, dim]}}
    return {
        "sharding_type": sharding,
        "compute_kernel": "fused" if optimizer else "dense",
        "columns": columns,
        "optimizer": optimizer,
        "state": sizes.get(optimizer or "", {}),
    }


@pytest.mark.parametrize(
    ("saved", "here", "movable"),
    [
        (table("table_wise", [8]), table("row_wise", [8]), True),
        (table("table_wise", [8]), table("column_wise", [4, 4]), False),
        (table("column_wise", [4, 4]), table("table_wise", [8]), False),
        (table("column_wise", [4, 4]), table("table_column_wise", [4, 4]), True),
        (table("column_wise", [4, 12]), table("column_wise", [8, 8]), False),  # as many numbers, of other columns
        (table("column_wise", [4, 12], ELEMENTWISE), table("column_wise", [8, 8], ELEMENTWISE), True),
        (table("table_wise", [8], SGD), table("column_wise", [4, 4], SGD), True),
        (table("table_wise", [8], SGD), table("table_wise", [8], ROWWISE), False),
        (table("table_wise", [8], ELEMENTWISE), table("table_wise", [8], ROWWISE), False),
        (table("table_wise", [8], SGD), table("data_parallel", [8], None), True),
        (table("table_wise", [8]), table("data_parallel", [8], None), False),
        (table("data_parallel", [8], None), table("row_wise", [8]), False),
        (table("data_parallel", [8], None), table("row_wise", [8], None), True),
    ],
)
def test_immovable(saved: dict[str, Any], here: dict[str, Any], movable: bool) -> None:
    reasons = immovable({"t": saved, "other": saved}, {"t": here, "new": here})
    assert list(reasons) == ([] if movable else ["t"])
    if not movable:
        assert saved["sharding_type"] in reasons["t"] and here["sharding_type"] in reasons["t"]


def test_two_optimizers_with_states_of_the_same_names_are_two() -> None:
    adam = {**table("table_wise", [8], ELEMENTWISE), "optimizer": "adam"}
    lamb = {**table("table_wise", [8], ELEMENTWISE), "optimizer": "lamb"}
    assert immovable({"t": adam}, {"t": lamb}) == {"t": "table_wise with adam when saved, table_wise with lamb here"}


def test_refusal_names_tables_shardings_and_ways_out() -> None:
    said = refusal(immovable({"t": table("table_wise", [8])}, {"t": table("column_wise", [4, 4])}))
    assert (
        "t: table_wise with exact_row_wise_adagrad of whole rows when saved, "
        "column_wise with exact_row_wise_adagrad of column shards [4, 4] here" in said
    )
    assert "optimizer_state='where possible'" in said and "optimizer_state=False" in said


def test_what_one_rank_knows_is_known_to_all() -> None:
    mine, theirs = table("table_wise", [8]), table("table_wise", [8])
    unknown = {"optimizer": None, "state": {}}
    merged = merge_descriptions([{"a": mine, "b": {**theirs, **unknown}}, {"a": {**mine, **unknown}, "b": theirs}])
    assert merged == {"a": mine, "b": theirs}
