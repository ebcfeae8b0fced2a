import numpy as np
import pytest

from torchrec_mpe.app.data.split import assign_splits, check_split
from torchrec_mpe.errors import UserError


def test_random_goes_by_the_stream_of_philox() -> None:
    splits = assign_splits("random", 10_000, seed=3)
    drawn = np.random.Generator(np.random.Philox(3)).random(10_000)
    assert [0 if u < 0.8 else 1 if u < 0.9 else 2 for u in drawn] == splits.tolist()
    assert abs(np.bincount(splits) - [8000, 1000, 1000]).max() < 150
    np.testing.assert_array_equal(assign_splits("random", 100, seed=3), splits[:100])
    assert (assign_splits("random", 10_000, seed=4) != splits).any()


def test_chronological_by_file_order() -> None:
    assert assign_splits("chronological", 20, seed=0).tolist() == [0] * 16 + [1] * 2 + [2] * 2


def test_chronological_by_time() -> None:
    times = np.array([9.0, 0, 8, 1, 7, 2, 6, 3, 5, 4])
    assert assign_splits("chronological", 10, 0, times).tolist() == [2, 0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_rows_of_equal_time_stay_together() -> None:
    times = np.array([0.0] * 7 + [1.0, 1.0, 2.0])
    assert assign_splits("chronological", 10, 0, times).tolist() == [0] * 7 + [1, 1, 2]


@pytest.mark.parametrize(
    ("kind", "seed", "time", "message"),
    [
        ("weekly", 0, None, "use 'random' or 'chronological'"),
        ("random", -1, None, "use 0 or more"),
        ("random", 0, "day", "use split 'chronological'"),
    ],
)
def test_impossible_options(kind: str, seed: int, time: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_split(kind, seed, time)
