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
    """``value <comparison> threshold`` makes a row positive; without a comparison, labels must be 0 or 1 already."""

    comparison: str | None
    threshold: float

    @classmethod
    def parse(cls, positive: str | None) -> "LabelRule":
        """Read an expression such as ``>=5``, ``==1``, ``>3`` or ``4`` (the same as ``==4``); None means 0 or 1.

        Raises:
            UserError: if ``positive`` is not a comparison with a finite number.
        """
        if positive is None:
            return cls(None, 0.0)
        match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<|=)?\s*(\S+)\s*", positive)
        try:
            threshold = float(match.group(2)) if match else math.nan
        except ValueError:
            threshold = math.nan
        if match is None or not math.isfinite(threshold):
            raise UserError(
                f"positive {positive!r} is not a comparison with a number: write one such as '>=5', '==1' or '4'"
            )
        comparison = match.group(1) or "=="
        return cls("==" if comparison == "=" else comparison, threshold)

    def valid(self, values: pl.Series) -> pl.Series:
        """Boolean series [n]: whether each float64 value (null if not a number) is an acceptable label."""
        known = values.is_finite().fill_null(False)
        return known if self.comparison else known & values.is_in([0.0, 1.0]).fill_null(False)

    def positive(self, values: pl.Series) -> pl.Series:
        """Boolean series [n]: whether each float64 value makes its row positive."""
        result: pl.Series = _COMPARE[self.comparison or "=="](values, self.threshold if self.comparison else 1.0)
        return result

    def __str__(self) -> str:
        return "0 or 1" if self.comparison is None else f"{self.comparison}{self.threshold:g}"
