"""Counts of lookups in one byte: exact up to 32, then rounded stochastically to one of 16 steps a doubling.

Byte ``c`` below 16 stands for itself, others for ``(16 + c % 16) * 2^(c // 16 - 1)``, up to 507,904. Bytes are in the
order of the counts they stand for.
"""

import torch
from torch import Tensor

LARGEST = 31 << 14


def decode_counts(byte: Tensor) -> Tensor:
    """Counts, int64, of bytes."""
    c = byte.long()
    return torch.where(c < 16, c, (16 + (c & 15)) << ((c >> 4) - 1).clamp(min=0))


def encode_count(count: int, noise: int) -> int:
    """The byte of a count; ``noise``, a uniform 32-bit integer, decides between the two nearest."""
    count = min(count, LARGEST)
    if count < 16:
        return count
    exponent = count.bit_length() - 5
    step = 1 << exponent
    mantissa = (count >> exponent) + (1 if (noise & (step - 1)) < (count & (step - 1)) else 0)
    # A mantissa of 32 is 16 of the next exponent, whose byte is the next.
    return min((exponent + 1 << 4) + (mantissa - 16), 255)


def halve_counts_(byte: Tensor) -> None:
    """Halve what each byte stands for, rounding down, in place."""
    byte.copy_(torch.where(byte < 32, byte >> 1, byte - 16))
