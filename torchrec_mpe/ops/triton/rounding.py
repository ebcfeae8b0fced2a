"""From values to codes, equal to torch's bit for bit."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl


@triton.jit
def divide(x, y):
    """The IEEE quotient: Triton's own ``/`` is approximate for float32."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def round_half_even(x):
    """``torch.round`` of |x| <= 2**22: adding 1.5 * 2**(mantissa bits) leaves no bit for the fraction."""
    if x.dtype == tl.float64:
        return (x + 6755399441055744.0) - 6755399441055744.0
    else:
        return (x + 12582912.0) - 12582912.0


@triton.jit
def round_to_code(scaled, low, high):
    """The signed code ``clamp(round(scaled), low, high)``, and whether rounding stayed inside; NaN stays NaN."""
    # One beyond the bounds is enough to know on which side a value fell, and keeps the rounding exact.
    scaled = tl.where(scaled < low - 1, low - 1, scaled)
    scaled = tl.where(scaled > high + 1, high + 1, scaled)
    rounded = round_half_even(scaled)
    code = tl.where(rounded < low, low, rounded)
    code = tl.where(code > high, high, code)
    return code, rounded == code
