"""Numbers as people read them."""

import math

from torchrec_mpe.app.report.estimates import Estimate

MINUS = "\N{MINUS SIGN}"
MISSING = "n/a"
UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


def decimal(value: float, digits: int, sign: bool = False) -> str:
    """``value`` with ``digits`` decimals, thousands grouped, and a real minus sign; "n/a" if it is no number."""
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return f"{MINUS if value < 0 else ''}\N{INFINITY}"
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", MINUS)


def auc_text(value: float) -> str:
    """An AUC with 4 decimals for a terminal; "-" where there is none."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def with_error(value: Estimate, digits: int, scale: float = 1.0, sign: bool = False) -> str:
    """``mean ± standard error``, or the mean alone where there is no error to give or it rounds to zero."""
    mean = decimal(value.mean * scale, digits, sign)
    if value.error is None or not math.isfinite(value.error) or round(value.error * scale, digits) == 0:
        return mean
    return f"{mean} ± {decimal(value.error * scale, digits)}"


def unit_of(size: float) -> tuple[int, str]:
    """The bytes and name of the largest unit not above ``size``."""
    return next((unit for unit in UNITS if size >= unit[0]), UNITS[-1])


def in_bytes(size: float, digits: int = 1) -> str:
    """``size`` bytes in B, KiB, MiB or GiB."""
    if not math.isfinite(size):
        return MISSING
    scale, name = unit_of(size)
    return f"{decimal(size / scale, 0 if scale == 1 else digits)} {name}"


def bytes_with_error(value: Estimate) -> str:
    """A size with its standard error in the same unit; the error is left out where it rounds to zero."""
    if not math.isfinite(value.mean):
        return MISSING
    scale, name = unit_of(value.mean)
    return f"{with_error(value, 0 if scale == 1 else 1, 1 / scale)} {name}"


def short_count(count: float) -> str:
    """A count in at most four characters: 950, 1.2k, 38k, 4.1M."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.5 and more would round up to a fourth digit.
        if count >= scale * 0.9995:
            return (
                f"{count / scale:.1f}".removesuffix(".0") + letter
                if count < 9.95 * scale
                else f"{count / scale:.0f}{letter}"
            )
    return f"{count:.0f}"
