"""Random numbers of stochastic rounding: those of :mod:`torchrec_mpe.ops.reference.philox`."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl


@triton.jit
def philox_words(row, batch, column, STREAM: tl.constexpr, seed):  # noqa: N803
    """The four words, uint32, for an int64 tile of rows of a table and an int32 tile of first columns."""
    c0 = row.to(tl.uint32)  # the lower half
    c1 = tl.zeros_like(c0) + tl.cast(batch, tl.uint32)
    c2 = tl.zeros_like(c0) + column.to(tl.uint32)
    c3 = ((row >> 32) * 256 + STREAM).to(tl.uint32)
    return tl.philox(seed, c0, c1, c2, c3)


@triton.jit
def noise16(
    row,
    batch,
    first_column,
    STREAM: tl.constexpr,  # noqa: N803
    seed,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Uniform 16-bit integers, int32 [ROWS, COLUMNS], for COLUMNS (a multiple of 8) from ``first_column`` on.

    ``first_column`` is where some eight columns start that share a call of Philox.
    """
    eight = tl.zeros([ROWS, COLUMNS // 8], dtype=tl.int32) + tl.arange(0, COLUMNS // 8)[None, :]
    row = tl.zeros([ROWS, COLUMNS // 8], dtype=tl.int64) + row[:, None]
    w0, w1, w2, w3 = philox_words(row, batch, first_column + 8 * eight, STREAM, seed)
    # tl.join puts its arguments side by side on a new last axis.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, COLUMNS // 2])
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS, COLUMNS]).to(tl.int32)
