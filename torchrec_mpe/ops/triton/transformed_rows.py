"""Rows of coded tables: the levels of every run at fixed places, and the pooling of components."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, assignment"
import torch
import triton
import triton.language as tl
from torch import Tensor

from torchrec_mpe.ops.reference.run_coding import MAX_COMPONENTS

_COMPONENTS = tl.constexpr(MAX_COMPONENTS)
_BLOCK_RUNS = 64


@triton.jit
def _block_of(component):
    """The block of each component: {0}, {1}, {2, 3}, {4 .. 7}, {8 .. 15}."""
    return (
        (component > 0).to(tl.int32)
        + (component > 1).to(tl.int32)
        + (component > 3).to(tl.int32)
        + (component > 7).to(tl.int32)
    )


@triton.jit
def _levels_kernel(
    run_records,
    run_offsets,
    levels,
    levels_offsets,
    components,
    levels_of_runs,
    BLOCK_RUNS: tl.constexpr,  # noqa: N803
):
    """One table."""
    table = tl.program_id(0)
    following = tl.load(levels_offsets + table)
    if following < 0:
        return
    first = tl.load(run_offsets + table)
    stop = tl.load(run_offsets + table + 1)
    k = tl.arange(0, _COMPONENTS)[None, :] + tl.zeros([BLOCK_RUNS, _COMPONENTS], dtype=tl.int32)
    in_table = k < tl.load(components + table)
    for block in range(first, stop, BLOCK_RUNS):
        run = block + tl.arange(0, BLOCK_RUNS)
        is_run = (run < stop)[:, None] & (k >= 0)
        coding = (tl.load(run_records + 2 * run + 1, mask=run < stop, other=0) >> 32).to(tl.int32)[:, None]
        transformed = coding < 0
        has_level = tl.where(transformed, (((coding >> 4 * _block_of(k)) & 15) > 0) & in_table, (coding > 0) & (k == 0))
        number = has_level.to(tl.int32)
        per_component = tl.where(transformed, 2, 1)
        size = tl.sum(number * per_component, axis=1)
        starts = following + tl.cumsum(size, axis=0) - size
        place = starts[:, None] + (tl.cumsum(number, axis=1) - number) * per_component
        scale = tl.load(levels + place, mask=has_level, other=0.0).to(tl.float32)
        offset = tl.load(levels + place + 1, mask=has_level & transformed, other=0.0).to(tl.float32)
        target = levels_of_runs + run[:, None] * (2 * _COMPONENTS) + k
        tl.store(target, scale, mask=is_run)
        tl.store(target + _COMPONENTS, offset, mask=is_run)
        following += tl.sum(size, axis=0)


def levels_of_runs(
    run_records: Tensor, run_offsets: Tensor, levels: Tensor, levels_offsets: Tensor, components: Tensor
) -> Tensor:
    """Scales and offsets of every run's components, so that a row finds them by its run alone.

    A launch of its own, of microseconds: what is kept between calls could be outdated by an update of the tables.

    Returns:
        Tensor: float32 [R, 2, 16], scales and offsets, 0 for components of 0 bits; of a plain run the step size in
        place of the first scale. Rows of other tables hold anything.
    """
    result = torch.empty((run_records.shape[0], 2, MAX_COMPONENTS), dtype=torch.float32, device=levels.device)
    _levels_kernel[(components.numel(),)](
        run_records, run_offsets, levels, levels_offsets, components, result, BLOCK_RUNS=_BLOCK_RUNS
    )
    return result


@triton.jit
def load_bits(words, bit, count, mask):
    """The ``count`` bits from each bit of ``words`` on, at most 64, in the lowest bits of an uint64.

    What lies above them are other bits, or zeros.
    """
    # In one or two aligned words, which the end padding keeps inside the buffer.
    in_word = bit & 63
    word = words + (bit >> 6)
    low = tl.load(word, mask=mask, other=0)
    high = tl.load(word + 1, mask=mask & (in_word + count > 64), other=0)
    shift = in_word.to(tl.uint64)
    return (low >> shift) | ((high << 1) << (63 - shift))


@triton.jit
def add_components(
    sums,
    words,
    row_start,
    coding,
    run,
    weight,
    levels_of_runs,
    COMPUTE: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
):
    """The weighted sums of components with those of one more tile of rows; rows that are not transformed add nothing.

    Args:
        sums: tuple of max(16 // LANES, 1) COMPUTE tiles [BAGS, LANES]: component ``j * LANES + lane`` of sums[j].
        words: uint64 pointer tile [ROWS, BAGS, LANES], of each row.
        row_start: int32 tile likewise, the row's first bit from there on.
        coding: int32 tile likewise, negative if the row is transformed.
        run: int32 tile likewise.
        weight: COMPUTE tile likewise.
    """
    transformed = coding < 0
    w0, w1, w2 = coding & 15, (coding >> 4) & 15, (coding >> 8) & 15
    w3, w4 = (coding >> 12) & 15, (coding >> 16) & 15
    # An upper bound of a row's bits where its table has fewer components than the blocks: it loads more than it needs.
    row_bits = w0 + w1 + 2 * w2 + 4 * w3 + 8 * w4
    first = load_bits(words, row_start, tl.minimum(row_bits, 64), transformed & (row_bits > 0))
    second = load_bits(words, row_start + 64, row_bits - 64, transformed & (row_bits > 64))
    level = levels_of_runs + run * (2 * _COMPONENTS)
    lane = tl.arange(0, LANES)[None, None, :]
    added = ()
    for j in tl.static_range(len(sums)):
        k = j * LANES + lane
        # Bits of the components before: all of the blocks before, and those of k's own.
        before = w0 * tl.minimum(k, 1) + w1 * tl.minimum(tl.maximum(k - 1, 0), 1)
        before += w2 * tl.minimum(tl.maximum(k - 2, 0), 2) + w3 * tl.minimum(tl.maximum(k - 4, 0), 4)
        before += w4 * tl.maximum(k - 8, 0)
        bits = (coding >> (4 * _block_of(k))) & 15
        place = (before & 63).to(tl.uint64)
        low = tl.where(before < 64, first, second)
        high = tl.where(before < 64, second, 0)
        code = ((low >> place) | ((high << 1) << (63 - place))).to(tl.int32) & ((1 << bits) - 1)
        is_read = transformed & (k < _COMPONENTS)
        scale = tl.load(level + k, mask=is_read, other=0.0).to(COMPUTE)
        offset = tl.load(level + _COMPONENTS + k, mask=is_read, other=0.0).to(COMPUTE)
        added += (sums[j] + tl.sum(weight * (scale * code.to(COMPUTE) + offset), axis=0),)
    return added


@triton.jit
def add_basis(
    pooled,
    sums,
    basis,
    components,
    dim,
    column,
    COMPUTE: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
):
    """``pooled`` [BAGS, COLUMNS] with the product of the sums of components and the basis added."""
    lane = tl.arange(0, LANES)[None, :]
    for k in tl.static_range(_COMPONENTS):
        of_component = tl.sum(tl.where(lane == k % LANES, sums[k // LANES], 0.0), axis=1)
        in_basis = (column < dim) & (k < components)
        direction = tl.load(basis + k * dim + column, mask=in_basis, other=0.0).to(COMPUTE)
        pooled += of_component[:, None] * direction[None, :]
    return pooled
