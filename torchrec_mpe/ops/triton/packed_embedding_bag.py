"""The lookup of packed tables: one launch for all features, and a small one before it for coded tables' levels."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, assignment"
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.check_bags import check_bags, check_call, check_offsets, check_out
from torchrec_mpe.ops.triton.device import check_device
from torchrec_mpe.ops.triton.row_directory import find_rows
from torchrec_mpe.ops.triton.transformed_rows import add_basis, add_components, levels_of_runs, load_bits

_FATAL = tl.constexpr(int(BoundsCheckMode.FATAL))
_WARNING = tl.constexpr(int(BoundsCheckMode.WARNING))
_NONE = tl.constexpr(int(BoundsCheckMode.NONE))
_NO_FAULT = 2**63 - 1


@triton.jit
def _bag_span(offsets, faults, feature, num_features, bag, batch, num_ids, MODE: tl.constexpr):  # noqa: N803
    """Where the ids of bags of one feature start and end, int64; no ids beyond the batch."""
    in_batch = bag < batch
    number = feature.to(tl.int64) * batch + bag
    start = tl.load(offsets + number, mask=in_batch, other=0).to(tl.int64)
    end = tl.load(offsets + number + 1, mask=in_batch, other=0).to(tl.int64)
    if MODE != _NONE:
        if MODE == _FATAL:
            last = tl.cast(num_features, tl.int64) * batch - 1
            is_bad = (start < 0) | (end < start) | (end > num_ids)
            is_bad |= ((number == 0) & (start != 0)) | ((number == last) & (end != num_ids))
            tl.atomic_min(faults + 1 + tl.zeros_like(number), number, mask=is_bad & in_batch)
        start = tl.minimum(tl.maximum(start, 0), num_ids)
        end = tl.minimum(tl.maximum(end, start), num_ids)
    return start, end


@triton.jit
def _scaled_codes(stream, bits, centre, scale, j: tl.constexpr):
    """``scale * code`` of element j of every block, summed over rows; [BAGS, LANES]."""
    code = (stream >> (j * bits).to(tl.uint64)).to(tl.uint32) & ((1 << bits) - 1).to(tl.uint32)
    # The code in the mantissa of 2**23: from integer to float exactly, without a conversion.
    in_mantissa = (code | 0x4B000000).to(tl.float32, bitcast=True)
    return tl.sum((in_mantissa - centre).to(scale.dtype) * scale, axis=0)


@triton.jit
def _add_block(sum0, sum1, sum2, sum3, sum4, sum5, sum6, sum7, stream, bits, centre, scale):
    """The sums of a block's 8 elements, each [BAGS, LANES], with one more tile of rows."""
    sum0 += _scaled_codes(stream, bits, centre, scale, 0)
    sum1 += _scaled_codes(stream, bits, centre, scale, 1)
    sum2 += _scaled_codes(stream, bits, centre, scale, 2)
    sum3 += _scaled_codes(stream, bits, centre, scale, 3)
    sum4 += _scaled_codes(stream, bits, centre, scale, 4)
    sum5 += _scaled_codes(stream, bits, centre, scale, 5)
    sum6 += _scaled_codes(stream, bits, centre, scale, 6)
    sum7 += _scaled_codes(stream, bits, centre, scale, 7)
    return sum0, sum1, sum2, sum3, sum4, sum5, sum6, sum7


@triton.jit
def _interleave(sum0, sum1, sum2, sum3, sum4, sum5, sum6, sum7):
    """[..., 2, 2, 2] from 8 tensors [...]: the last axis is the lowest bit of the tensor's number."""
    even = tl.join(tl.join(sum0, sum4), tl.join(sum2, sum6))
    odd = tl.join(tl.join(sum1, sum5), tl.join(sum3, sum7))
    return tl.join(even, odd)


@triton.jit(do_not_specialize=["batch", "bag_programs", "num_ids"])
def _lookup_kernel(
    weights,
    weights_offsets,
    rows_per_table,
    run_records,
    run_starts,
    run_offsets,
    directory_kinds,
    directory,
    directory_offsets,
    alpha,
    beta,
    beta_offsets,
    scale_index,
    zero_rows,
    zero_row_offsets,
    of_runs,
    bases,
    bases_offsets,
    components,
    features,
    indices,
    offsets,
    per_sample_weights,
    out,
    faults,
    warning,
    batch,
    bag_programs,
    num_ids,
    num_features,
    column_programs,
    total_D,  # noqa: N803
    MODE: tl.constexpr,  # noqa: N803
    COUNT_WARNINGS: tl.constexpr,  # noqa: N803
    WEIGHTED: tl.constexpr,  # noqa: N803
    CODED: tl.constexpr,  # noqa: N803
    COMPUTE: tl.constexpr,  # noqa: N803
    COLUMN_MULTIPLE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    BAGS: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
):
    """BAGS bags of one feature, 16 * LANES columns, ROWS rows of every bag at a time.

    Tiles are [ROWS, BAGS, LANES] with BAGS * LANES = 32: a lane of the warp holds two blocks of one bag and sums their
    rows in its registers, and the loads of all its rows are under way before the first is used. The lanes of a bag look
    its rows up in the directory each for themselves: handing the result over would cost about as much.

    CODED: some tables are coded. The components of their transformed rows are summed beside, shared out among the lanes
    of a bag, and multiplied by the basis once a bag.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, LANES)[None, None, :]
    first_block = (program % column_programs) * LANES * 2
    block = first_block + 2 * lane
    first_column = first_block * 8
    feature = program // column_programs // bag_programs
    first_bag = (program // column_programs % bag_programs) * BAGS
    table = tl.load(features + feature)
    start_column = tl.load(features + num_features + feature)
    dim = tl.load(features + 2 * num_features + feature)
    is_mean = tl.load(features + 3 * num_features + feature)
    if first_column >= dim:
        return

    row_limit = tl.load(rows_per_table + table)
    table_start = tl.load(weights_offsets + table)
    scale_set = tl.load(scale_index + table)
    words = weights.to(tl.pointer_type(tl.uint64))
    basis_start = -1
    sums = ()
    if CODED:
        for _ in tl.static_range(max(16 // LANES, 1)):
            sums += (tl.zeros([BAGS, LANES], dtype=COMPUTE),)
        basis_start = tl.load(bases_offsets + table)

    bag = first_bag + tl.arange(0, BAGS)
    start, end = _bag_span(offsets, faults, feature, num_features, bag, batch, num_ids, MODE)
    # Of every lane, so that all tiles have one layout.
    row_in_tile = tl.arange(0, ROWS)[:, None, None] + tl.zeros([ROWS, BAGS, LANES], dtype=tl.int32)
    reports = (lane == 0) & (first_column == 0)

    weight_of_beta = tl.zeros([BAGS, LANES], dtype=COMPUTE)
    weight_of_zero = tl.zeros([BAGS, LANES], dtype=COMPUTE)
    a0 = tl.zeros([BAGS, LANES], dtype=COMPUTE)
    a1, a2, a3, a4, a5, a6, a7 = a0, a0, a0, a0, a0, a0, a0
    b0, b1, b2, b3, b4, b5, b6, b7 = a0, a0, a0, a0, a0, a0, a0, a0
    longest = tl.max(end - start, axis=0).to(tl.int32)
    for step in range(0, longest, ROWS):
        position = start[None, :, None] + step + row_in_tile
        is_id = position < end[None, :, None]
        row = tl.load(indices + position, mask=is_id, other=-1).to(tl.int64)
        if MODE != _NONE:
            is_bad = (row < -1) | (row >= row_limit)
            if MODE == _FATAL:
                tl.atomic_min(faults + tl.zeros_like(row), position, mask=is_bad & reports)
            if COUNT_WARNINGS:
                count = tl.sum(tl.reshape((is_bad & reports).to(tl.int64), [ROWS * BAGS * LANES]), axis=0)
                tl.atomic_add(warning, count, mask=count > 0)
            row = tl.where(is_bad, tl.where(row_limit > 0, 0, -1), row)
        is_row = row >= 0
        row_start, coding, run = find_rows(
            run_records,
            run_starts,
            run_offsets,
            directory_kinds,
            directory,
            directory_offsets,
            table,
            row_limit,
            dim,
            tl.where(is_row, row, 0).to(tl.int32),
            is_row,
        )
        weight = is_row.to(COMPUTE)
        if WEIGHTED:
            weight = tl.load(per_sample_weights + position, mask=is_row, other=0.0).to(COMPUTE)
        # Transformed rows have a coding below 0, and no bits of elements.
        has_bits = coding != 0
        bits = tl.maximum(coding, 0) if CODED else coding
        weight_of_beta += tl.sum(tl.where(has_bits, weight, 0.0), axis=0)
        weight_of_zero += tl.sum(tl.where(has_bits, 0.0, weight), axis=0)
        row_start += table_start * 8
        row_words = words + (row_start >> 6)
        bit = (row_start & 63).to(tl.int32)
        if CODED:
            if basis_start >= 0:
                sums = add_components(sums, row_words, bit, coding, run, weight, of_runs, COMPUTE, LANES)
            step = tl.where(basis_start >= 0, of_runs + run * 32, alpha + scale_set * 9 + bits)
            step_size = tl.load(step, mask=bits > 0, other=0.0).to(COMPUTE)
        else:
            step_size = tl.load(alpha + scale_set * 9 + bits).to(COMPUTE)
        scale = tl.where(bits > 0, weight * step_size, 0.0)
        centre = (0x4B000000 | ((1 << bits) >> 1)).to(tl.float32, bitcast=True)
        bit += block * bits * 8
        is_read = (bits > 0) & (block * 8 < dim)
        stream = load_bits(row_words, bit, bits * 8, is_read)
        second_is_read = (bits > 0) & (block * 8 + 8 < dim)
        second_stream = load_bits(row_words, bit + bits * 8, bits * 8, second_is_read)
        a0, a1, a2, a3, a4, a5, a6, a7 = _add_block(a0, a1, a2, a3, a4, a5, a6, a7, stream, bits, centre, scale)
        b0, b1, b2, b3, b4, b5, b6, b7 = _add_block(b0, b1, b2, b3, b4, b5, b6, b7, second_stream, bits, centre, scale)

    pooled = _interleave(
        tl.join(a0, b0),
        tl.join(a1, b1),
        tl.join(a2, b2),
        tl.join(a3, b3),
        tl.join(a4, b4),
        tl.join(a5, b5),
        tl.join(a6, b6),
        tl.join(a7, b7),
    )
    pooled = tl.reshape(pooled, [BAGS, LANES * 16])
    column = first_column + tl.arange(0, LANES * 16)
    in_table = column < dim
    if CODED:
        if basis_start >= 0:
            count = tl.load(components + table)
            pooled = add_basis(pooled, sums, bases + basis_start, count, dim, column, COMPUTE, LANES)
            offset = tl.load(bases + basis_start + count * dim + column, mask=in_table, other=0.0).to(COMPUTE)
        else:
            offset = tl.load(beta + tl.load(beta_offsets + scale_set) + column, mask=in_table, other=0.0).to(COMPUTE)
    else:
        offset = tl.load(beta + tl.load(beta_offsets + scale_set) + column, mask=in_table, other=0.0).to(COMPUTE)
    pooled += tl.max(weight_of_beta, axis=1)[:, None] * offset[None, :]
    zero_start = tl.load(zero_row_offsets + table)
    zero = tl.load(zero_rows + zero_start + column, mask=in_table & (zero_start >= 0), other=0.0).to(COMPUTE)
    pooled += tl.max(weight_of_zero, axis=1)[:, None] * zero[None, :]
    if is_mean != 0:
        pooled /= tl.maximum(end - start, 1).to(COMPUTE)[:, None]
    target = bag.to(tl.int64) * total_D + tl.multiple_of(start_column, COLUMN_MULTIPLE)
    target = target[:, None] + column[None, :]
    tl.store(out + target, pooled.to(out.dtype.element_ty), mask=(bag < batch)[:, None] & in_table[None, :])


@lru_cache(maxsize=64)
def _features_on(
    D_offsets: tuple[int, ...],  # noqa: N803
    feature_table_map: tuple[int, ...],
    pooling_mode: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """int32 [4, F]: table, first column, embedding dimension and pooling mode of each feature."""
    dims = [stop - start for start, stop in pairwise(D_offsets)]
    values = [list(feature_table_map), list(D_offsets[:-1]), dims, list(pooling_mode)]
    return torch.tensor(values, dtype=torch.int32, device=device)


def tile_shape(embedding_dim: int, coded: bool) -> tuple[int, int, int]:
    """ROWS, BAGS and LANES of a program of one warp for tables of up to ``embedding_dim`` elements.

    Where some table is coded a lane has components too, and room for half the rows.
    Where features differ in dimension, lanes beyond the end of a narrow table's rows idle.
    """
    lanes = min(triton.next_power_of_2(triton.cdiv(embedding_dim, 16)), 32)
    return 2 if coded else 4, 32 // lanes, lanes


def max_registers(coded: bool) -> int:
    """Of a lane: 16 programs on a multiprocessor, 12 where some table is coded; either spills little."""
    return 168 if coded else 128


def packed_embedding_bag(
    weights: Tensor,
    weights_offsets: Tensor,
    rows_per_table: Tensor,
    run_records: Tensor,
    run_starts: Tensor,
    run_offsets: Tensor,
    directory_kinds: Tensor,
    directory: Tensor,
    directory_offsets: Tensor,
    alpha: Tensor,
    beta: Tensor,
    beta_offsets: Tensor,
    scale_index: Tensor,
    zero_rows: Tensor,
    zero_row_offsets: Tensor,
    levels: Tensor,
    levels_offsets: Tensor,
    bases: Tensor,
    bases_offsets: Tensor,
    components: Tensor,
    D_offsets: Sequence[int],  # noqa: N803
    feature_table_map: Sequence[int],
    pooling_mode: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None = None,
    output_dtype: torch.dtype = torch.float32,
    bounds_check_mode: int = BoundsCheckMode.FATAL,
    bounds_check_warning: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`torchrec_mpe.ops.packed_embedding_bag.packed_embedding_bag`.

    Mode FATAL reads the kernel's findings back: it waits for the device, cannot be captured in a CUDA graph, and has
    written ``out`` when it raises. The other modes do not wait. WARNING and IGNORE cut bags to the ids there are where
    offsets decrease or leave [0, N], which FATAL reports as ValueError; NONE trusts offsets and ids.

    Raises:
        IndexError: in mode FATAL, naming table and feature, if an id is not a row of its table.
        TypeError, ValueError: as the op's; ValueError also for CPU tensors outside Triton's interpreter, and if
            ``weights`` or ``directory`` do not start at a multiple of 8 bytes.
    """
    check_device(weights)
    check_call(D_offsets, feature_table_map, pooling_mode, per_sample_weights, output_dtype, rows_per_table.numel())
    num_features = len(feature_table_map)
    check_bags(indices, offsets, num_features, per_sample_weights)
    for name, tensor in (("weights", weights), ("directory", directory)):
        if tensor.data_ptr() % 8:
            raise ValueError(f"{name} must start at a multiple of 8 bytes: the kernel reads 8 bytes at a time")
    batch = (offsets.numel() - 1) // num_features if num_features else 0
    if out is None:
        out = torch.empty((batch, D_offsets[-1]), dtype=output_dtype, device=weights.device)
    else:
        check_out(out, batch, D_offsets[-1], output_dtype, weights.device)
    is_fatal = bounds_check_mode == BoundsCheckMode.FATAL
    if out.numel() == 0:
        if is_fatal:
            check_offsets(offsets, indices.numel())
        return out

    features = _features_on(tuple(D_offsets), tuple(feature_table_map), tuple(pooling_mode), weights.device)
    faults = torch.full((2,), _NO_FAULT, dtype=torch.int64, device=weights.device) if is_fatal else offsets
    coded = bases.numel() > 0
    of_runs = levels_of_runs(run_records, run_offsets, levels, levels_offsets, components) if coded else alpha
    max_dim = max(stop - start for start, stop in pairwise(D_offsets))
    rows, bags, lanes = tile_shape(max_dim, coded)
    bag_programs = triton.cdiv(batch, bags)
    column_programs = triton.cdiv(max_dim, lanes * 16)
    _lookup_kernel[(num_features * bag_programs * column_programs,)](
        weights,
        weights_offsets,
        rows_per_table,
        run_records,
        run_starts,
        run_offsets,
        directory_kinds,
        directory,
        directory_offsets,
        alpha,
        beta,
        beta_offsets,
        scale_index,
        zero_rows,
        zero_row_offsets,
        of_runs,
        bases,
        bases_offsets,
        components,
        features,
        indices.contiguous(),
        offsets.contiguous(),
        alpha if per_sample_weights is None else per_sample_weights.contiguous(),
        out,
        faults,
        offsets if bounds_check_warning is None else bounds_check_warning,
        batch,
        bag_programs,
        indices.numel(),
        num_features,
        column_programs,
        D_offsets[-1],
        MODE=int(bounds_check_mode),
        COUNT_WARNINGS=bounds_check_mode == BoundsCheckMode.WARNING and bounds_check_warning is not None,
        WEIGHTED=per_sample_weights is not None,
        CODED=coded,
        COMPUTE=tl.float64 if output_dtype == torch.float64 else tl.float32,
        COLUMN_MULTIPLE=math.gcd(16, *D_offsets),
        ROWS=rows,
        BAGS=bags,
        LANES=lanes,
        num_warps=1,
        maxnreg=max_registers(coded),
    )
    if is_fatal:
        bad_position, bad_bag = faults.tolist()
        if bad_bag != _NO_FAULT:
            check_offsets(offsets, indices.numel())
        if bad_position != _NO_FAULT:
            _raise_bad_id(bad_position, indices, offsets, batch, feature_table_map, rows_per_table)
    return out


def _raise_bad_id(
    position: int,
    indices: Tensor,
    offsets: Tensor,
    batch: int,
    feature_table_map: Sequence[int],
    rows_per_table: Tensor,
) -> None:
    ends = offsets[batch::batch].tolist()
    feature = next(f for f, end in enumerate(ends) if position < end)
    table = feature_table_map[feature]
    raise IndexError(
        f"table {table}, feature {feature}: id {int(indices[position])} is not in [0, {int(rows_per_table[table])})"
    )
