import polars as pl
import pytest

from torchrec_mpe.app.data.label import LabelRule
from torchrec_mpe.errors import UserError

VALUES = pl.Series([1.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (">=4", [False, False, True, True]),
        (">4", [False, False, False, True]),
        ("<=3", [True, True, False, False]),
        ("<3", [True, False, False, False]),
        ("==4", [False, False, True, False]),
        ("=4", [False, False, True, False]),
        ("4", [False, False, True, False]),
        ("4.0", [False, False, True, False]),
        ("!=4", [True, True, False, True]),
        (" > 3.5 ", [False, False, True, True]),
        (">-1e3", [True, True, True, True]),
    ],
)
def test_expressions(expression: str, expected: list[bool]) -> None:
    rule = LabelRule.parse(expression)
    assert rule.positive(VALUES).to_list() == expected
    assert rule.valid(pl.Series([2.5, None, float("nan"), float("inf")])).to_list() == [True, False, False, False]


def test_without_expression_only_zero_and_one_are_labels() -> None:
    rule = LabelRule.parse(None)
    values = pl.Series([0.0, 1.0, 2.0, 0.5, None])
    assert rule.valid(values).to_list() == [True, True, False, False, False]
    assert rule.positive(values[:2]).to_list() == [False, True]


@pytest.mark.parametrize(
    "expression", ["", ">=", ">=x", "nan", ">inf", "3 4", "4,5", "yes,4", "yes,", "=>3", "=>yes", "yes=no"]
)
def test_bad_expressions(expression: str) -> None:
    with pytest.raises(UserError, match="is not a comparison with a number"):
        LabelRule.parse(expression)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("True", [True, False, False]),
        ("==True", [True, False, False]),
        ("!=skip", [True, False, True]),
        (" True , not now", [True, False, True]),
        ("true", [False, False, False]),
    ],
)
def test_labels_that_are_texts(expression: str, expected: list[bool]) -> None:
    rule = LabelRule.parse(expression)
    labels = pl.Series(["True", "skip", "not now"])
    assert rule.positive(labels).to_list() == expected
    assert rule.valid(pl.Series(["True", "", "other"])).to_list() == [True, False, True]
    assert LabelRule.parse(str(rule)) == rule
