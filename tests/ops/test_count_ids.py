"""Counting lookups, on every backend."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from tests.ops.every_backend import CPU, FAST, on
from torchrec_mpe.ops import library
from torchrec_mpe.ops.count_ids import count_ids_


@pytest.fixture(params=[b for b in FAST if b == "reference" or b == CPU[-1]])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with on(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("threads", [1, 3])
def test_counts_what_a_dictionary_counts(backend: str, dtype: torch.dtype, threads: int) -> None:
    g = torch.Generator().manual_seed(0)
    tables = {"a": (0, 50), "b": (50, 7), "c": (57, 1000)}
    features = ["a", "b", "a", "c", "b"]  # tables of two features: their threads must not meet
    per_feature = [400, 0, 37, 1000, 90]
    expected: Counter[int] = Counter()
    ids: list[int] = []
    for feature, n in zip(features, per_feature, strict=True):
        first, rows = tables[feature]
        mine = torch.randint(-3, rows + 3, (n,), generator=g).tolist()
        ids += mine
        expected.update(first + i for i in mine if 0 <= i < rows)
    counts = torch.full((1060,), 5, dtype=torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        count_ids_(
            counts,
            torch.tensor(ids, dtype=dtype),
            per_feature,
            [tables[f][0] for f in features],
            [tables[f][1] for f in features],
        )
    finally:
        torch.set_num_threads(before)
    assert counts.tolist() == [5 + expected[row] for row in range(1060)]


def test_nothing_to_count(backend: str) -> None:
    counts = torch.zeros(3, dtype=torch.int64)
    count_ids_(counts, torch.zeros(0, dtype=torch.int64), [0, 0], [0, 1], [1, 2])
    count_ids_(counts, torch.zeros(0, dtype=torch.int64), [], [], [])
    assert not counts.any()


@pytest.mark.parametrize(
    ("per_feature", "first_row", "num_rows"),
    [
        ([1], [0], [4]),
        ([2], [0], [9]),
        ([2], [-1], [4]),
        ([3, -1], [0, 0], [4, 4]),
        ([2], [0, 0], [4]),
        ([2], [2], [7]),
    ],
)
def test_what_would_be_written_outside_is_refused(
    per_feature: list[int], first_row: list[int], num_rows: list[int]
) -> None:
    counts, ids = torch.zeros(8, dtype=torch.int64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="ids"):
        count_ids_(counts, ids, per_feature, first_row, num_rows)
    if library.is_loaded():
        with pytest.raises(ValueError):
            torch.ops.torchrec_mpe.count_ids_(counts, ids, per_feature, first_row, num_rows)
    assert not counts.any()


def test_counts_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        count_ids_(torch.zeros(8), torch.tensor([0, 1]), [2], [0], [8])


def test_op_is_registered_as_torch_wants() -> None:
    args = (torch.zeros(8, dtype=torch.int64), torch.tensor([0, 1, 3]), [2, 1], [0, 4], [4, 4])
    torch.library.opcheck(torch.ops.torchrec_mpe.count_ids_.default, args)
