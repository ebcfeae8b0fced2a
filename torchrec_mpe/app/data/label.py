"""Which label values count as positive."""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import polars as pl

from torchrec_mpe.errors import UserError

_COMPARE: dict[str, Callable[[Any, float], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class LabelRule:
    """``value <comparison> threshold`` makes a row positive; without a comparison, labels must be 0 or 1 already.

    With ``texts``, labels are texts, and those are positive ("==") or all others are ("!=").
    """

    comparison: str | None
    threshold: float
    texts: tuple[str, ...] = ()

    @classmethod
    def parse(cls, positive: str | None) -> "LabelRule":
        """Read an expression such as ``>=5``, ``==1``, ``>3`` or ``4`` (the same as ``==4``), or texts such as ``yes``,
        ``click,buy`` or ``!=skip``; None means 0 or 1.

        Raises:
            UserError: if ``positive`` is neither a comparison with a finite number nor texts with a letter in each.
        """
        if positive is None:
            return cls(None, 0.0)
        texts = re.fullmatch(r"\s*(==|!=|=)?\s*([^<>=!]+?)\s*", positive)
        if texts:
            names = tuple(name.strip() for name in texts.group(2).split(","))
            if all(re.search(r"[^\W\d_]", name) and not _is_number(name) for name in names):
                return cls("!=" if texts.group(1) == "!=" else "==", 0.0, names)
        match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<|=)?\s*(\S+)\s*", positive)
        try:
            threshold = float(match.group(2)) if match else math.nan
        except ValueError:
            threshold = math.nan
        if match is None or not math.isfinite(threshold):
            raise UserError(
                f"positive {positive!r} is not a comparison with a number: write one such as '>=5', '==1' or '4', or "
                "labels such as 'True' or 'click,buy'"
            )
        comparison = match.group(1) or "=="
        return cls("==" if comparison == "=" else comparison, threshold)

    def valid(self, values: pl.Series) -> pl.Series:
        """Boolean series [n]: whether each value, float64 (null if not a number) or text, is an acceptable label."""
        if self.texts:
            return values != ""
        known = values.is_finite().fill_null(False)
        return known if self.comparison else known & values.is_in([0.0, 1.0]).fill_null(False)

    def positive(self, values: pl.Series) -> pl.Series:
        """Boolean series [n]: whether each value, as in :meth:`valid`, makes its row positive."""
        if self.texts:
            named = values.is_in(self.texts)
            return named if self.comparison == "==" else ~named
        result: pl.Series = _COMPARE[self.comparison or "=="](values, self.threshold if self.comparison else 1.0)
        return result

    def __str__(self) -> str:
        if self.texts:
            return ("!=" if self.comparison == "!=" else "") + ",".join(self.texts)
        return "0 or 1" if self.comparison is None else f"{self.comparison}{self.threshold:g}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
