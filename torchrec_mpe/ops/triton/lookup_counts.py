"""Counts of lookups in one byte, as :mod:`torchrec_mpe.ops.reference.lookup_counts` defines them."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from torchrec_mpe.ops.reference.lookup_counts import LARGEST
from torchrec_mpe.ops.reference.stored_rows import STREAM_COUNTS
from torchrec_mpe.ops.triton.noise import philox_words

_LARGEST = tl.constexpr(LARGEST)
_COUNTS = tl.constexpr(STREAM_COUNTS)


@triton.jit
def add_lookups(byte, lookups, row, batch, seed):
    """The byte, int32, of a count with some lookups more.

    Args:
        byte: int32 tile.
        lookups: int32 tile, at least 0.
        row: int64 tile, numbers in the whole table, which with batch and seed determine the rounding.
    """
    count = tl.where(byte < 16, byte, (16 + (byte & 15)) << (tl.maximum(byte >> 4, 1) - 1))
    count = tl.minimum(count + tl.minimum(lookups, _LARGEST), _LARGEST)
    # The exponent of a float: exact below 2**24.
    log2 = (count.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.maximum(log2 - 4, 0)
    below = (1 << exponent) - 1
    noise, _, _, _ = philox_words(row, batch, tl.zeros_like(byte), _COUNTS, seed)
    rounds_up = ((noise.to(tl.int32) & below) < (count & below)).to(tl.int32)
    return tl.minimum(((exponent + 1) << 4) + (count >> exponent) + rounds_up - 16, 255)
