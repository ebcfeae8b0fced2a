"""Quantizing rows into a backing store and reading them back, in pure PyTorch: the definition.

A row's value at a column is ``scale * (code + offset * grain)``, with

- ``scale``: one byte, UE5M3 (unsigned, 5 bits of exponent, 3 of mantissa): byte ``c`` stands for the float32 whose bits
  are ``(101 << 23) + (c << 20)``, 1.7e-8 to 56; 0 for a row of zeros and 255 for a row with a value that is not finite;
- ``offset``: one byte, signed; ``grain`` is 1/4 at 4 bits and 4 at 8 bits;
- ``code``: 0 to 2^bits - 1.

The scale is the smallest whose grid covers the row from its minimum to its maximum, so no value is clipped unless the
row spans more than scale 56 does (840 at 4 bits, 14280 at 8).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_mpe.ops.cache_tensors import STATE_BYTES, BackingStore, StoredRow
from torchrec_mpe.ops.reference.philox import noise16

GRAIN = {4: 0.25, 8: 4.0}
_SCALE_BASE = 101 << 23
_SCALE_ZERO, _SCALE_LARGEST, _SCALE_NAN = 0, 254, 255
_STATE_BASE = 83 << 23  # of ue6m2: byte c stands for the float32 with bits _STATE_BASE + (c << 21), and 0 for zero

STREAM_CODES, STREAM_STATES, STREAM_COUNTS = 0, 1, 2


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
    """See :func:`torchrec_mpe.ops.write_stored_rows_`."""
    _check_moves(stores, values, moves)
    tables = zip(stores, values, states, moves, seeds, first_rows, first_columns, strict=True)
    for store, from_values, from_states, (slots, rows), seed, first_row, first_column in tables:
        slots, rows = slots.long(), rows.long()
        numbers = rows + first_row
        state_bytes = []
        if from_states:
            together = torch.cat([state[slots].float() for state in from_states], 1)
            noise = noise16(numbers, batch, STREAM_STATES, first_column, together.shape[1], seed)
            noise = noise if stochastic_rounding else torch.full_like(noise, 1 << 15)
            widths = [state.shape[1] for state in from_states]
            parts = zip(together.split(widths, 1), noise.split(widths, 1), state_dtypes, strict=True)
            state_bytes = [_encode_state(*part) for part in parts]
        for bits, held, mask, index in _by_width(store, rows):
            x = from_values[slots[mask]].float()
            noise = noise16(numbers[mask], batch, STREAM_CODES, first_column, x.shape[1], seed)
            u = (noise.float() + 0.5) / 65536 if stochastic_rounding else torch.full_like(x, 0.5)
            scale, offset, codes = quantize_rows(x, u, bits)
            if bits == 4:
                codes = codes[:, ::2] | codes[:, 1::2] << 4
            record = torch.cat([codes, scale[:, None], (offset & 0xFF)[:, None], *(b[mask] for b in state_bytes)], 1)
            held[index, : record.shape[1]] = record.to(torch.uint8)


def read_stored_rows_(
    stores: Sequence[BackingStore],
    values: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    moves: Sequence[tuple[Tensor, Tensor]],
    state_dtypes: Sequence[str],
) -> None:
    """See :func:`torchrec_mpe.ops.read_stored_rows_`."""
    _check_moves(stores, values, moves)
    for store, to_values, to_states, (slots, rows) in zip(stores, values, states, moves, strict=True):
        slots, rows = slots.long(), rows.long()
        for bits, held, mask, index in _by_width(store, rows):
            row = StoredRow(bits, to_values.shape[1])
            record = held[index].long()
            codes = record[:, : row.code_bytes]
            if bits == 4:
                codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
            scale, offset = record[:, row.code_bytes], record[:, row.code_bytes + 1]
            to_values[slots[mask]] = dequantize_rows(scale, (offset ^ 128) - 128, codes, bits).to(to_values.dtype)
            start = row.bytes
            for state, dtype in zip(to_states, state_dtypes, strict=bool(to_states)):
                size = state.shape[1] * STATE_BYTES[dtype]
                part = held[index][:, start : start + size].clone(memory_format=torch.contiguous_format)
                state[slots[mask]] = _decode_state(part, dtype).to(state.dtype)
                start += size


def _check_moves(
    stores: Sequence[BackingStore], values: Sequence[Tensor], moves: Sequence[tuple[Tensor, Tensor]]
) -> None:
    for t, (store, of_table, (slots, rows)) in enumerate(zip(stores, values, moves, strict=True)):
        for name, numbers, limit in (("slot", slots, len(of_table)), ("row", rows, store.num_rows)):
            outside = numbers[(numbers < 0) | (numbers >= limit)]
            if len(outside):
                raise IndexError(f"table {t} has {limit} {name}s, got the {name} {outside[0]}")


def quantize_rows(x: Tensor, u: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale bytes [n], offsets [n] and codes [n, D], int64, of rows [n, D]; ``u`` in [0, 1) is added before floor."""
    levels, grain = 2**bits - 1, GRAIN[bits]
    finite = x.isfinite().all(1)
    x = torch.where(finite[:, None], x, 0.0)
    low, high = x.amin(1), x.amax(1)
    least = torch.maximum((high - low) / (levels - grain), low.abs() / (127 * grain))
    # The smallest scale that is not below: mantissa bits below the kept ones round up.
    byte = (least.view(torch.int32).long() - _SCALE_BASE + 0xFFFFF) >> 20
    byte = byte.clamp(1, _SCALE_LARGEST)
    scale = _scale(byte)
    inverse = 1.0 / scale
    offset = torch.floor(low * inverse / grain).clamp(-128, 127)
    codes = torch.floor((x * inverse[:, None] - (offset * grain)[:, None]) + u).clamp(0, levels)
    zero = (low == 0) & (high == 0)
    byte = torch.where(zero, _SCALE_ZERO, byte)
    byte = torch.where(finite, byte, _SCALE_NAN)
    nothing = zero | ~finite
    return byte, torch.where(nothing, 0, offset.long()), torch.where(nothing[:, None], 0, codes.long())


def dequantize_rows(scale: Tensor, offset: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Float32 [n, D] of scale bytes [n], offsets [n] and codes [n, D], all int64."""
    values = _scale(scale)[:, None] * (codes.float() + (offset.float() * GRAIN[bits])[:, None])
    values = torch.where((scale == _SCALE_ZERO)[:, None], 0.0, values)
    return torch.where((scale == _SCALE_NAN)[:, None], float("nan"), values)


def _scale(byte: Tensor) -> Tensor:
    return (_SCALE_BASE + (byte << 20)).to(torch.int32).view(torch.float32)


def _by_width(store: BackingStore, rows: Tensor) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """For 4 and 8 bits: the store's rows, which of ``rows`` are of that width, and their index there."""
    if not len(store.is_wide):
        wide = torch.full_like(rows, len(store.rows8) > 0, dtype=torch.bool)
        index = rows
    else:
        word, bit = store.is_wide[rows >> 6], rows & 63
        wide = (word >> bit & 1).bool()
        below = (word[:, None] >> torch.arange(64, device=rows.device) & 1) * (
            torch.arange(64, device=rows.device) < bit[:, None]
        )
        before = store.wide_before[rows >> 6].long() + below.sum(1)
        index = torch.where(wide, before, rows - before)
    return [(4, store.rows4, ~wide, index[~wide]), (8, store.rows8, wide, index[wide])]


def _encode_state(x: Tensor, noise: Tensor, dtype: str) -> Tensor:
    """Bytes [n, elements * size], int64, of float32 [n, elements], rounded by 16-bit noise."""
    if dtype == "fp32":
        return x.contiguous().view(torch.uint8).view(len(x), 4 * x.shape[1]).long()
    bits = x.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    if dtype == "bf16":
        rounded = torch.where(x.isfinite(), bits + noise, bits | torch.where(x.isnan(), 0x10000, 0)) >> 16
        return torch.stack((rounded & 0xFF, rounded >> 8 & 0xFF), -1).flatten(1)
    # ue6m2, of non-negative values: 21 bits are cut off, the noise is their upper 16.
    smallest = torch.tensor(_STATE_BASE + (1 << 21), dtype=torch.int32, device=x.device).view(torch.float32)
    byte = (bits - _STATE_BASE + (noise << 5) + 16) >> 21
    tiny = (noise.float() + 0.5) / 65536 * smallest < x
    byte = torch.where(x < smallest, tiny.long(), byte.clamp(max=255))
    return torch.where(x > 0, byte, torch.where(x.isnan(), 255, 0))


def _decode_state(part: Tensor, dtype: str) -> Tensor:
    """Float32 [n, elements] of bytes [n, elements * size]."""
    if dtype == "fp32":
        return part.view(torch.float32)
    if dtype == "bf16":
        return part.view(torch.bfloat16).float()
    byte = part.to(torch.int32)
    return torch.where(byte > 0, (_STATE_BASE + (byte << 21)).view(torch.float32), 0.0)
