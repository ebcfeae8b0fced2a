import math

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from torchrec_mpe.app.data.bucketing import bucket_text, dense_feature


def test_buckets_computed_by_hand() -> None:
    # ln(3)^2 = 1.21, ln(5)^2 = 2.59, ln(100)^2 = 21.2, ln(1e6)^2 = 190.9
    values = pl.Series([None, -2.0, 0.0, 1.0, 2.0, 3.0, 5.0, 100.0, 1e6])
    assert bucket_text(values).to_list() == ["", "-2", "0", "1", "2", "1", "2", "21", "190"]


def test_small_fractions_stay_themselves() -> None:
    assert bucket_text(pl.Series([0.25, 2.5, -0.5, 1.0, None])).to_list() == ["0.25", "0", "-0.5", "1", ""]


def test_text_does_not_depend_on_the_other_rows() -> None:
    values = [0.25, -0.0, 1.0, -1e300, 7.0, None]
    together = bucket_text(pl.Series(values)).to_list()
    assert together == [bucket_text(pl.Series([value], dtype=pl.Float64))[0] for value in values]


@given(st.integers(min_value=3, max_value=2**53))
def test_large_numbers_agree_with_python(value: int) -> None:
    exact = math.log(value) ** 2
    if abs(exact - round(exact)) > 1e-9:
        assert bucket_text(pl.Series([float(value)]))[0] == str(math.floor(exact))


def test_dense_features() -> None:
    frame = pl.DataFrame({"v": [None, -3.0, 0.0, math.e - 1]}).select(dense_feature(pl.col("v")))
    assert frame["v"].dtype == pl.Float32
    assert frame["v"].to_list() == [0.0, 0.0, 0.0, 1.0]
