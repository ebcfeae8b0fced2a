"""The tensors of a cached table: its backing store, and the directory of its cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_mpe.ops.huge_pages import zeros_in_huge_pages

WAYS = 32
"""Slots of a set."""

STATE_BYTES = {"fp32": 4, "bf16": 2, "ue6m2": 1}
"""How an element of optimizer state can be stored. ``ue6m2`` is for states that are never negative: 6 bits of exponent
and 2 of mantissa, from 7e-14 to 9e5, zero among them."""


@dataclass(frozen=True)
class StoredRow:
    """What a row of the backing store is made of.

    ``codes`` (``dim * bits / 8`` bytes, the first of two 4-bit codes in the low half), the scale (1 byte), the offset
    (1 byte), then each optimizer state's elements (little-endian), without gaps. Its value at a column is
    ``scale * (code + offset * grain)``, see :mod:`torchrec_mpe.ops.reference.stored_rows`.

    Attributes:
        bits (int): 4 or 8.
        dim (int): columns, even.
        states (tuple[tuple[int, str], ...]): elements a row and a key of ``STATE_BYTES``, for each optimizer state.
    """

    bits: int
    dim: int
    states: tuple[tuple[int, str], ...] = ()

    @property
    def code_bytes(self) -> int:
        return self.dim * self.bits // 8

    @property
    def state_bytes(self) -> int:
        return sum(elements * STATE_BYTES[dtype] for elements, dtype in self.states)

    @property
    def bytes(self) -> int:
        """Of a whole row."""
        return self.code_bytes + 2 + self.state_bytes


class BackingStore(NamedTuple):
    """All rows of a table (or of a shard of it), quantized.

    Attributes:
        rows4 (Tensor): uint8 [n4, bytes of a 4-bit row]; n4 is 0 if all rows have 8 bits.
        rows8 (Tensor): uint8 [n8, bytes of an 8-bit row]; n8 is 0 if all rows have 4 bits.
        is_wide (Tensor): int64 [ceil(n / 64)], bit ``r % 64`` of word ``r // 64`` tells that row ``r`` has 8 bits;
            empty if all rows have equally many. Rows of a width lie in the order of their numbers.
        wide_before (Tensor): int32, as long as ``is_wide``: 8-bit rows before each word's.
    """

    rows4: Tensor
    rows8: Tensor
    is_wide: Tensor
    wide_before: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.rows4) + len(self.rows8)


class CacheDirectory(NamedTuple):
    """Which rows a cache holds. Slots 0 to ``WAYS * sets`` are the cache's, those after them its spill area.

    Row ``r`` is in set ``r % sets``, slots ``WAYS * set`` to ``WAYS * (set + 1)``, or anywhere in the spill area.
    Counts are of lookups, coded as :mod:`torchrec_mpe.ops.reference.lookup_counts` says.

    Attributes:
        slot_rows (Tensor): int32 [slots], the row in each slot, -1 where there is none.
        slot_batches (Tensor): int32 [slots], the last batch that looked the row up.
        slot_dirty (Tensor): uint8 [slots], 1 where the cached copy may differ from the store's.
        slot_counts (Tensor): uint8 [slots] with LFU, else empty: how often each row was looked up.
        row_counts (Tensor): uint8 [rows] with LFU, else empty: the same of the rows that are in no slot.
        statistics (Tensor): int64 [6], see :class:`CacheCounter`.
    """

    slot_rows: Tensor
    slot_batches: Tensor
    slot_dirty: Tensor
    slot_counts: Tensor
    row_counts: Tensor
    statistics: Tensor

    @property
    def is_lfu(self) -> bool:
        return len(self.row_counts) > 0


class CacheCounter:
    """What each element of ``CacheDirectory.statistics`` counts, in the order of FBGEMM's ``UVMCacheStatsIndex``."""

    CALLS = 0
    REQUESTED = 1
    UNIQUE = 2
    UNIQUE_MISSES = 3
    CONFLICT_UNIQUE_MISSES = 4
    EVICTIONS = 5


class RowMoves(NamedTuple):
    """Rows that change place between cache and store, all int32 tensors on the cache's device.

    Attributes:
        written_slots, written_rows (Tensor): [w], rows to be quantized into the store, and the slots they are in.
        fetched_slots, fetched_rows (Tensor): [f], rows to be read from the store, and the slots they go to; to be done
            after the writing, which frees slots.
    """

    written_slots: Tensor
    written_rows: Tensor
    fetched_slots: Tensor
    fetched_rows: Tensor


def empty_directory(
    rows: int, sets: int, spill: int, *, lfu: bool, device: torch.device | str | None = None
) -> CacheDirectory:
    """A directory of a cache that holds nothing."""
    slots = WAYS * sets + spill
    return CacheDirectory(
        torch.full((slots,), -1, dtype=torch.int32, device=device),
        torch.zeros(slots, dtype=torch.int32, device=device),
        torch.zeros(slots, dtype=torch.uint8, device=device),
        torch.zeros(slots if lfu else 0, dtype=torch.uint8, device=device),
        torch.zeros(rows if lfu else 0, dtype=torch.uint8, device=device),
        torch.zeros(6, dtype=torch.int64, device=device),
    )


def empty_store(
    bits: int | Tensor,
    rows: int,
    dim: int,
    states: Sequence[tuple[int, str]] = (),
    *,
    device: torch.device | str | None = None,
    pin_memory: bool = False,
) -> BackingStore:
    """A store whose rows are all zero.

    Args:
        bits (int | Tensor): 4 or 8; or bool [rows], true for rows of 8 bits.
        rows (int): number of rows.
        dim (int): columns.
        states (Sequence[Tuple[int, str]]): of :class:`StoredRow`.
        device (Optional[torch.device]): where to put it.
        pin_memory (bool): in page-locked host memory, for a CUDA device to read and write; device must be the CPU.
    """
    is_wide = torch.zeros(0, dtype=torch.int64)
    before = torch.zeros(0, dtype=torch.int32)
    if isinstance(bits, Tensor):
        wide = int(bits.sum())
        padded = torch.zeros(-(-rows // 64) * 64, dtype=torch.int64)
        padded[:rows] = bits.to("cpu", torch.int64)
        by_word = padded.view(-1, 64)
        is_wide = (by_word << torch.arange(64)).sum(1)  # the sum wraps into the sign bit, as a bitmap may
        before = (by_word.sum(1).cumsum(0) - by_word.sum(1)).int()
        if wide in (0, rows):
            is_wide, before = is_wide[:0], before[:0]
    else:
        wide = rows if bits == 8 else 0
    row4, row8 = (StoredRow(b, dim, tuple(states)) for b in (4, 8))
    return BackingStore(
        _zeros(rows - wide, row4.bytes, device, pin_memory),
        _zeros(wide, row8.bytes, device, pin_memory),
        is_wide.pin_memory() if pin_memory else is_wide.to(device),
        before.pin_memory() if pin_memory else before.to(device),
    )


def _zeros(rows: int, row_bytes: int, device: torch.device | str | None, pin_memory: bool) -> Tensor:
    if torch.device(device or "cpu").type == "cpu" and not pin_memory:
        return zeros_in_huge_pages(rows, row_bytes)
    return torch.zeros(rows, row_bytes, dtype=torch.uint8, device=device, pin_memory=pin_memory)
