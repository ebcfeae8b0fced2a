"""Which cache slot each looked-up row is in, and which rows have to change place for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.ops import library, triton_backend
from torchrec_mpe.ops.backends import implementation, register
from torchrec_mpe.ops.cache_tensors import WAYS, CacheDirectory, RowMoves
from torchrec_mpe.ops.reference import cache_slots as reference


def assign_cache_slots_(
    directories: Sequence[CacheDirectory],
    ids: Tensor,
    ids_per_table: Sequence[int],
    num_rows: Sequence[int],
    num_sets: Sequence[int],
    first_rows: Sequence[int],
    seeds: Sequence[int],
    batch: int,
    oldest_in_flight: int,
    dirty: bool,
    *,
    backend: str | None = None,
) -> tuple[Tensor, list[RowMoves], list[int]]:
    """Give every row of a batch a slot of its table's cache, in place in the directories.

    A row that is in no slot takes an empty one of its set, else that of the victim: the row of the set that was looked
    up longest ago (LRU), or least often (LFU; among equals longest ago), lowest slot first. Slots whose last batch is
    ``oldest_in_flight`` or later are never victims. A row that finds none, or with LFU was itself looked up less often
    than the victim, goes to the spill area. Spilled rows that no batch in flight waits for are sent back to the store.
    Rows that miss are dealt with in the order in which the batch first names them.

    If the spill area of a table is too small, nothing changes at all.

    Args:
        directories (Sequence[CacheDirectory]): T, on one device.
        ids (Tensor): int32 or int64 [N], table after table.
        ids_per_table (Sequence[int]): T numbers, their sum is N.
        num_rows (Sequence[int]): T numbers, rows of the table or shard; ids are below.
        num_sets (Sequence[int]): T numbers, see :class:`CacheDirectory`.
        first_rows (Sequence[int]): T numbers, the shard's first row, for the random numbers of LFU counts.
        seeds (Sequence[int]): T numbers below 2^63, of the tables' random numbers.
        batch (int): number of the batch, larger than all before, at most 2^31 - 1.
        oldest_in_flight (int): the first batch whose rows may yet be updated, at most ``batch``.
        dirty (bool): the batch is going to update its rows.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Returns:
        Tuple[Tensor, List[RowMoves], List[int]]: the slot of every id [N] in their dtype, T moves to be done with
            :func:`write_stored_rows_` and :func:`read_stored_rows_`, and T numbers of spill slots that are needed.
            If one is larger than the spill area, slots [0] and no moves.

    Raises:
        TypeError: if a tensor has another dtype.
        ValueError: if numbers or shapes do not fit each other.
        IndexError: for an id that is no row of its table, naming the table's number; nothing has changed then.
    """
    tables = len(directories)
    for name, numbers in (
        ("ids_per_table", ids_per_table),
        ("num_rows", num_rows),
        ("num_sets", num_sets),
        ("first_rows", first_rows),
        ("seeds", seeds),
    ):
        if len(numbers) != tables:
            raise ValueError(f"{tables} tables need as many {name}, got {len(numbers)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
    if ids.dim() != 1 or sum(ids_per_table) != len(ids) or min(ids_per_table, default=0) < 0:
        raise ValueError(f"ids {list(ids.shape)} are not of {list(ids_per_table)} for each table")
    if not 0 <= oldest_in_flight <= batch < 2**31:
        raise ValueError(f"batch {batch} and the oldest in flight {oldest_in_flight} must be in order, below 2^31")
    for t, (directory, sets) in enumerate(zip(directories, num_sets, strict=True)):
        if not 1 <= sets <= len(directory.slot_rows) // WAYS:
            raise ValueError(f"table {t} has {sets} sets of {WAYS} slots, but {len(directory.slot_rows)} slots")
    result: tuple[Tensor, list[RowMoves], list[int]] = implementation("assign_cache_slots_", backend)(
        directories, ids, ids_per_table, num_rows, num_sets, first_rows, seeds, batch, oldest_in_flight, dirty
    )
    return result


def _compiled(directories: Sequence[CacheDirectory], *arguments: Any) -> tuple[Tensor, list[RowMoves], list[int]]:
    fields = [[directory[k] for directory in directories] for k in range(len(CacheDirectory._fields))]
    slots, moves, needed = torch.ops.torchrec_mpe.assign_cache_slots_(*fields, *arguments)
    return slots, [RowMoves(*moves[k : k + 4]) for k in range(0, len(moves), 4)], needed


def _fake(slot_rows: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, list[Tensor], list[int]]:
    """Of a call that fits: as many slots as ids, and moves of unknown length."""
    ids = arguments[5]
    context = torch.library.get_ctx()
    moves = []
    for rows in slot_rows:
        written, fetched = context.new_dynamic_size(), context.new_dynamic_size()
        moves += [rows.new_empty(n) for n in (written, written, fetched, fetched)]
    sets = arguments[8]
    return torch.empty_like(ids), moves, [len(rows) - WAYS * s for rows, s in zip(slot_rows, sets, strict=True)]


register("assign_cache_slots_", "reference", reference.assign_cache_slots_)
if library.is_loaded():
    register("assign_cache_slots_", "cpu", _compiled)
    torch.library.register_fake("torchrec_mpe::assign_cache_slots_", _fake)
    torch.library.impl("torchrec_mpe::assign_cache_slots_", "CUDA", triton_backend.CUDA_CACHE["assign_cache_slots_"])
