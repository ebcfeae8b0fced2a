"""Rows of backing stores, quantized and read back: one launch for the codes of all tables, one for each state."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchrec_mpe.ops.cache_tensors import STATE_BYTES, BackingStore, StoredRow
from torchrec_mpe.ops.reference.stored_rows import STREAM_CODES, STREAM_STATES
from torchrec_mpe.ops.triton.device import check_device
from torchrec_mpe.ops.triton.noise import noise16
from torchrec_mpe.ops.triton.rounding import divide
from torchrec_mpe.ops.triton.table_fields import address, check, on_device, pointer

# The fields of a table. Of its store: rows of each width, how many, and their bytes; which are wide.
_ROWS4, _ROWS8, _NUM4, _NUM8, _BYTES4, _BYTES8, _IS_WIDE, _WIDE_BEFORE = (tl.constexpr(i) for i in range(8))
# Of what is moved, the codes or a state: its first byte in a stored row, its first element of all states'; its floats.
_START4, _START8, _FIRST, _COLUMNS, _FLOATS, _STRIDE, _NUM_SLOTS = (tl.constexpr(i) for i in range(8, 15))
# Of the moves.
_SLOTS, _ROWS, _MOVES, _SEED, _FIRST_ROW, _FIRST_COLUMN, _FIELDS = (tl.constexpr(i) for i in range(15, 22))

_CODES = tl.constexpr(STREAM_CODES)
_STATES = tl.constexpr(STREAM_STATES)
_SCALE_BASE = tl.constexpr(101 << 23)
_STATE_BASE = tl.constexpr(83 << 23)
_STATE_DTYPES = ("fp32", "bf16", "ue6m2")
_FP32, _BF16, _UE6M2 = (tl.constexpr(i) for i in range(3))

_TILE_ELEMENTS = 512
_PROGRAMS = 2048  # of a table at most, which then take its tiles in turn
# Without fusing a product and a sum, codes are those of the reference.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _set_bits(word):
    """How many bits of each uint64 are set."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((word * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def _moved_rows(fields, first, ROWS: tl.constexpr):  # noqa: N803
    """Slots, rows, where the rows' bytes start and whether they have 8 bits, for ROWS moves from ``first`` on.

    Moves that name no slot of the cache or no row of the store are masked out.
    """
    move = first + tl.arange(0, ROWS)
    mask = move < tl.load(fields + _MOVES)
    slot = tl.load(pointer(fields, _SLOTS, tl.int32) + move, mask=mask, other=-1)
    row = tl.load(pointer(fields, _ROWS, tl.int32) + move, mask=mask, other=-1)
    num4, num8 = tl.load(fields + _NUM4), tl.load(fields + _NUM8)
    mask &= (slot >= 0) & (slot < tl.load(fields + _NUM_SLOTS)) & (row >= 0) & (row < num4 + num8)
    is_mixed = tl.load(fields + _IS_WIDE) != 0
    word = tl.load(pointer(fields, _IS_WIDE, tl.uint64) + (row >> 6), mask=mask & is_mixed, other=0)
    before = tl.load(pointer(fields, _WIDE_BEFORE, tl.int32) + (row >> 6), mask=mask & is_mixed, other=0)
    bit = (row & 63).to(tl.uint64)
    before += _set_bits(word & ((tl.cast(1, tl.uint64) << bit) - 1))
    wide = tl.where(is_mixed, ((word >> bit) & 1) != 0, num8 > 0)
    index = tl.where(is_mixed, tl.where(wide, before, row - before), row).to(tl.int64)
    mask &= (index >= 0) & (index < tl.where(wide, num8, num4))
    start = tl.where(wide, tl.load(fields + _ROWS8), tl.load(fields + _ROWS4))
    start += index * tl.where(wide, tl.load(fields + _BYTES8), tl.load(fields + _BYTES4))
    start += tl.where(wide, tl.load(fields + _START8), tl.load(fields + _START4))
    return slot.to(tl.int64), row.to(tl.int64), start.to(tl.pointer_type(tl.uint8)), wide, mask


@triton.jit
def _scale(byte):
    return ((byte << 20) + _SCALE_BASE).to(tl.float32, bitcast=True)


@triton.jit
def _floor(x):
    """As int32; Triton's own takes a subnormal number for zero."""
    towards_zero = x.to(tl.int32)
    return towards_zero - (towards_zero.to(tl.float32) > x).to(tl.int32)


@triton.jit
def _quantize(x, mask, noise, wide):
    """Scale bytes, offsets and codes, int32, of rows; as the reference, step for step."""
    bits = x.to(tl.int32, bitcast=True)
    finite = tl.min(((bits & 0x7F800000) != 0x7F800000).to(tl.int32), axis=1) != 0
    x = tl.where(finite[:, None], x, 0.0)
    low = tl.min(tl.where(mask, x, float("inf")), axis=1)
    high = tl.max(tl.where(mask, x, float("-inf")), axis=1)
    low, high = tl.where(finite, low, 0.0), tl.where(finite, high, 0.0)
    levels = tl.where(wide, 255.0, 15.0)
    grain = tl.where(wide, 4.0, 0.25)
    least = tl.maximum(divide(high - low, levels - grain), divide(tl.abs(low), 127.0 * grain))
    byte = (least.to(tl.int32, bitcast=True) - _SCALE_BASE + 0xFFFFF) >> 20
    byte = tl.minimum(tl.maximum(byte, 1), 254)
    inverse = divide(tl.zeros_like(low) + 1.0, _scale(byte))
    # Exact, for grain is a power of two.
    grains = low * inverse * tl.where(wide, 0.25, 4.0)
    offset = _floor(tl.minimum(tl.maximum(grains, -128.0), 127.0))
    u = (noise.to(tl.float32) + 0.5) * (1.0 / 65536)
    codes = (x * inverse[:, None] - (offset.to(tl.float32) * grain)[:, None]) + u
    codes = tl.minimum(tl.maximum(codes, 0.0), levels[:, None]).to(tl.int32)
    zero = (low == 0.0) & (high == 0.0)
    byte = tl.where(finite, tl.where(zero, 0, byte), 255)
    nothing = zero | (finite == 0)
    return byte, tl.where(nothing, 0, offset), tl.where(nothing[:, None], 0, codes)


@triton.jit(do_not_specialize=["batch"])
def _write_codes_kernel(
    tables,
    batch,
    STOCHASTIC: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    fields = tables + tl.program_id(1) * _FIELDS
    dim = tl.load(fields + _COLUMNS).to(tl.int32)
    column = tl.arange(0, COLUMNS)[None, :]
    pair = tl.arange(0, COLUMNS // 2)[None, :]
    floats = pointer(fields, _FLOATS, tl.float32)
    moves = tl.load(fields + _MOVES).to(tl.int32)
    for first in range(tl.program_id(0) * ROWS, moves, tl.num_programs(0) * ROWS):
        slot, row, record, wide, live = _moved_rows(fields, first, ROWS)
        mask = live[:, None] & (column < dim)
        x = tl.load(floats + slot[:, None] * tl.load(fields + _STRIDE) + column, mask=mask, other=0.0)
        if STOCHASTIC:
            first_column = tl.load(fields + _FIRST_COLUMN).to(tl.int32)
            number = row + tl.load(fields + _FIRST_ROW)
            noise = noise16(number, batch, first_column, _CODES, tl.load(fields + _SEED), ROWS, COLUMNS)
            byte, offset, codes = _quantize(x, mask, noise, wide)
        else:
            byte, offset, codes = _quantize(x, mask, tl.full([ROWS, COLUMNS], 32767.5, tl.float32), wide)
        even, odd = tl.split(tl.reshape(codes, [ROWS, COLUMNS // 2, 2]))
        narrow = (live & (wide == 0))[:, None] & (2 * pair < dim)
        tl.store(record[:, None] + column, codes.to(tl.uint8), mask=mask & wide[:, None])
        tl.store(record[:, None] + pair, (even | (odd << 4)).to(tl.uint8), mask=narrow)
        scale_byte = record + tl.where(wide, dim, dim // 2)
        tl.store(scale_byte, byte.to(tl.uint8), mask=live)
        tl.store(scale_byte + 1, (offset & 0xFF).to(tl.uint8), mask=live)


@triton.jit
def _read_codes_kernel(tables, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    fields = tables + tl.program_id(1) * _FIELDS
    dim = tl.load(fields + _COLUMNS).to(tl.int32)
    column = tl.arange(0, COLUMNS)[None, :]
    floats = pointer(fields, _FLOATS, tl.float32)
    moves = tl.load(fields + _MOVES).to(tl.int32)
    for first in range(tl.program_id(0) * ROWS, moves, tl.num_programs(0) * ROWS):
        slot, _, record, wide, live = _moved_rows(fields, first, ROWS)
        mask = live[:, None] & (column < dim)
        place = tl.where(wide[:, None], column, column >> 1)
        codes = tl.load(record[:, None] + place, mask=mask, other=0).to(tl.int32)
        codes = tl.where(wide[:, None], codes, (codes >> (4 * (column & 1))) & 15)
        scale_byte = record + tl.where(wide, dim, dim // 2)
        byte = tl.load(scale_byte, mask=live, other=0).to(tl.int32)
        offset = (tl.load(scale_byte + 1, mask=live, other=0).to(tl.int32) ^ 128) - 128
        zero_point = offset.to(tl.float32) * tl.where(wide, 4.0, 0.25)
        x = _scale(byte)[:, None] * (codes.to(tl.float32) + zero_point[:, None])
        x = tl.where((byte == 0)[:, None], 0.0, x)
        x = tl.where((byte == 255)[:, None], float("nan"), x)
        tl.store(floats + slot[:, None] * tl.load(fields + _STRIDE) + column, x, mask=mask)


@triton.jit
def _encode_ue6m2(x, bits, noise):
    smallest = tl.cast(_STATE_BASE + (1 << 21), tl.int32).to(tl.float32, bitcast=True)
    byte = (bits - _STATE_BASE + (noise << 5) + 16) >> 21
    tiny = (noise.to(tl.float32) + 0.5) * (1.0 / 65536) * smallest < x
    byte = tl.where(x < smallest, tiny.to(tl.int32), tl.minimum(byte, 255))
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(x > 0, byte, tl.where(is_nan, 255, 0))


@triton.jit(do_not_specialize=["batch"])
def _write_state_kernel(
    tables,
    batch,
    STOCHASTIC: tl.constexpr,  # noqa: N803
    DTYPE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    fields = tables + tl.program_id(1) * _FIELDS
    first_element = tl.load(fields + _FIRST).to(tl.int32)
    # Tiles start where eight elements start that share a call of Philox.
    element = tl.arange(0, COLUMNS)[None, :] - first_element % 8
    inside = (element >= 0) & (element < tl.load(fields + _COLUMNS))
    floats = pointer(fields, _FLOATS, tl.int32)  # their bits
    moves = tl.load(fields + _MOVES).to(tl.int32)
    for first in range(tl.program_id(0) * ROWS, moves, tl.num_programs(0) * ROWS):
        slot, row, record, _, live = _moved_rows(fields, first, ROWS)
        mask = live[:, None] & inside
        bits = tl.load(floats + slot[:, None] * tl.load(fields + _STRIDE) + element, mask=mask, other=0)
        if DTYPE == _FP32:
            for byte in tl.static_range(4):
                tl.store(record[:, None] + 4 * element + byte, (bits >> (8 * byte)).to(tl.uint8), mask=mask)
        else:
            noise = tl.full([ROWS, COLUMNS], 1 << 15, tl.int32)
            if STOCHASTIC:
                first_column = (tl.load(fields + _FIRST_COLUMN) + first_element // 8 * 8).to(tl.int32)
                number = row + tl.load(fields + _FIRST_ROW)
                noise = noise16(number, batch, first_column, _STATES, tl.load(fields + _SEED), ROWS, COLUMNS)
            if DTYPE == _BF16:
                finite = (bits & 0x7F800000) != 0x7F800000
                is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
                rounded = tl.where(finite, bits + noise, bits | tl.where(is_nan, 0x10000, 0))
                for byte in tl.static_range(2):
                    code = (rounded >> (16 + 8 * byte)).to(tl.uint8)
                    tl.store(record[:, None] + 2 * element + byte, code, mask=mask)
            else:
                code = _encode_ue6m2(bits.to(tl.float32, bitcast=True), bits, noise)
                tl.store(record[:, None] + element, code.to(tl.uint8), mask=mask)


@triton.jit
def _read_state_kernel(tables, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    fields = tables + tl.program_id(1) * _FIELDS
    element = tl.arange(0, COLUMNS)[None, :]
    floats = pointer(fields, _FLOATS, tl.int32)  # their bits
    moves = tl.load(fields + _MOVES).to(tl.int32)
    for first in range(tl.program_id(0) * ROWS, moves, tl.num_programs(0) * ROWS):
        slot, _, record, _, live = _moved_rows(fields, first, ROWS)
        mask = live[:, None] & (element < tl.load(fields + _COLUMNS))
        if DTYPE == _UE6M2:
            code = tl.load(record[:, None] + element, mask=mask, other=0).to(tl.int32)
            bits = tl.where(code > 0, (code << 21) + _STATE_BASE, 0)
        else:
            SIZE: tl.constexpr = 4 if DTYPE == _FP32 else 2  # noqa: N806
            bits = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
            for byte in tl.static_range(SIZE):
                part = tl.load(record[:, None] + SIZE * element + byte, mask=mask, other=0).to(tl.int32)
                bits |= part << (32 - 8 * SIZE + 8 * byte)
        tl.store(floats + slot[:, None] * tl.load(fields + _STRIDE) + element, bits, mask=mask)


def write_stored_rows_(
    stores: Sequence[BackingStore],
    values: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    moves: Sequence[tuple[Tensor, Tensor]],
    state_dtypes: Sequence[str],
    batch: int,
    seeds: Sequence[int],
    first_rows: Sequence[int],
    first_columns: Sequence[int],
    stochastic_rounding: bool,
) -> None:
    """See :func:`torchrec_mpe.ops.stored_rows.write_stored_rows_`.

    Stores may lie in pinned host memory, which the kernels write themselves; a CPU that reads them must wait for the
    device first. Moves that name no slot or no row are left out.

    Raises:
        ValueError: for CPU tensors outside Triton's interpreter; if a tensor is of another device, stored rows are not
            as long as values and states need, or columns do not follow each other.
        TypeError: if a tensor is of another dtype.
    """
    moves = [(slots.contiguous(), rows.contiguous()) for slots, rows in moves]
    parts = _parts(stores, values, states, moves, state_dtypes, seeds, first_rows, first_columns)
    # As int32 the batch's 32 bits are the same.
    batch = (batch + 2**31) % 2**32 - 2**31
    kernels = _write_codes_kernel, _write_state_kernel
    _launch(kernels, parts, state_dtypes, values, batch, STOCHASTIC=stochastic_rounding)


def read_stored_rows_(
    stores: Sequence[BackingStore],
    values: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    moves: Sequence[tuple[Tensor, Tensor]],
    state_dtypes: Sequence[str],
) -> None:
    """See :func:`torchrec_mpe.ops.stored_rows.read_stored_rows_`, and :func:`write_stored_rows_`."""
    moves = [(slots.contiguous(), rows.contiguous()) for slots, rows in moves]
    no_noise = [0] * len(stores)
    parts = _parts(stores, values, states, moves, state_dtypes, no_noise, no_noise, no_noise)
    _launch((_read_codes_kernel, _read_state_kernel), parts, state_dtypes, values)


def tile_shape(columns: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, powers of two; a row is never cut."""
    tile_columns = max(8, triton.next_power_of_2(columns))
    return max(1, _TILE_ELEMENTS // tile_columns), tile_columns


def _launch(
    kernels: tuple[Any, Any],
    parts: list[list[list[int]]],
    state_dtypes: Sequence[str],
    values: Sequence[Tensor],
    *arguments: int,
    **constants: bool,
) -> None:
    """Run the first kernel on the codes, the second on each state."""
    moves = max((fields[_MOVES.value] for fields in parts[0]), default=0)
    if not moves:
        return
    tables = on_device(parts, values[0].device)
    for k, part in enumerate(parts):
        columns = max(fields[_FIRST.value] % 8 + fields[_COLUMNS.value] for fields in part)
        tile_rows, tile_columns = tile_shape(columns)
        shape = {"ROWS": tile_rows, "COLUMNS": tile_columns}
        grid = (min(triton.cdiv(moves, tile_rows), _PROGRAMS), len(part))
        if k == 0:
            kernels[0][grid](tables[k], *arguments, **constants, **shape, **_OPTIONS)
        else:
            dtype = _STATE_DTYPES.index(state_dtypes[k - 1])
            kernels[1][grid](tables[k], *arguments, **constants, **shape, DTYPE=dtype, **_OPTIONS)


def _parts(
    stores: Sequence[BackingStore],
    values: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    moves: Sequence[tuple[Tensor, Tensor]],
    state_dtypes: Sequence[str],
    seeds: Sequence[int],
    first_rows: Sequence[int],
    first_columns: Sequence[int],
) -> list[list[list[int]]]:
    """The fields of T tables for the codes and for each state, all tensors checked."""
    parts: list[list[list[int]]] = [[] for _ in range(1 + len(state_dtypes))]
    tables = zip(stores, values, states, moves, seeds, first_rows, first_columns, strict=True)
    for t, (store, of_values, of_states, of_moves, *noise) in enumerate(tables):
        check_device(of_values)
        device, dim = of_values.device, of_values.shape[1]
        if dim % 2:
            raise ValueError(f"table {t} has {dim} columns, which must be even")
        layout = tuple((state.shape[1], dtype) for state, dtype in zip(of_states, state_dtypes, strict=bool(of_states)))
        of_store = _store_fields(store, dim, layout, device, t)
        of_call = [*_move_fields(of_moves, device, t), *noise]
        parts[0].append([*of_store, 0, 0, 0, *_float_fields(of_values, device, f"table {t}: values"), *of_call])
        element = byte = 0
        for k, dtype in enumerate(state_dtypes):
            place = [dim // 2 + 2 + byte, dim + 2 + byte, element]
            floats = [0] * 4  # no columns: nothing is moved
            if of_states:
                floats = _float_fields(of_states[k], device, f"table {t}: state {k}")
            parts[1 + k].append([*of_store, *place, *floats, *of_call])
            element += floats[0]
            byte += floats[0] * STATE_BYTES[dtype]
    return parts


def _store_fields(
    store: BackingStore, dim: int, states: tuple[tuple[int, str], ...], device: torch.device, t: int
) -> list[int]:
    sizes = []
    for bits, rows in ((4, store.rows4), (8, store.rows8)):
        check(rows, torch.uint8, f"table {t}: {bits}-bit rows")
        needed = StoredRow(bits, dim, states).bytes
        if len(rows) and rows.shape[1] < needed:
            raise ValueError(f"table {t}: {bits}-bit rows have {rows.shape[1]} bytes, but values and states {needed}")
        sizes.append(rows.shape[1])
    check(store.is_wide, torch.int64, f"table {t}: is_wide")
    check(store.wide_before, torch.int32, f"table {t}: wide_before")
    words = triton.cdiv(store.num_rows, 64)
    needs_widths = len(store.rows4) > 0 and len(store.rows8) > 0
    if len(store.is_wide) not in (words, words if needs_widths else 0) or len(store.wide_before) != len(store.is_wide):
        raise ValueError(f"table {t} has {store.num_rows} rows, but {len(store.is_wide)} words tell their widths")
    of_rows4, of_rows8, is_wide, before = (
        address(tensor, device, f"table {t}: {name}") for name, tensor in zip(store._fields, store, strict=True)
    )
    return [of_rows4, of_rows8, len(store.rows4), len(store.rows8), *sizes, is_wide, before]


def _float_fields(floats: Tensor, device: torch.device, name: str) -> list[int]:
    if floats.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {floats.dtype}")
    rows, columns = floats.shape
    if floats.stride(1) != 1 and columns > 1:
        raise ValueError(f"{name}: columns must follow each other")
    if floats.device != device:
        raise ValueError(f"{name} must be on {device}, not on {floats.device}")
    return [columns, floats.data_ptr(), floats.stride(0), rows]


def _move_fields(moves: tuple[Tensor, Tensor], device: torch.device, t: int) -> list[int]:
    slots, rows = moves
    if len(slots) != len(rows):
        raise ValueError(f"table {t}: {len(slots)} slots are moved, but {len(rows)} rows")
    for name, tensor in (("slots", slots), ("rows", rows)):
        check(tensor, torch.int32, f"table {t}: moved {name}")
    return [*(address(tensor, device, f"table {t}: moves") for tensor in moves), len(slots)]
