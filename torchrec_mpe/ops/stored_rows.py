"""Rows of backing stores: quantized and written, read and dequantized."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.ops import library, triton_backend
from torchrec_mpe.ops.backends import implementation, register
from torchrec_mpe.ops.cache_tensors import STATE_BYTES, BackingStore, StoredRow
from torchrec_mpe.ops.reference import stored_rows as reference


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
    *,
    backend: str | None = None,
) -> None:
    """Quantize rows of the caches of T tables into the tables' stores.

    Args:
        stores (Sequence[BackingStore]): T, of the tables or shards.
        values (Sequence[Tensor]): T of float32 [slots, D], contiguous.
        states (Sequence[Sequence[Tensor]]): T times float32 [slots, elements] for each optimizer state. None for a
            table leaves its stored states as they are.
        moves (Sequence[Tuple[Tensor, Tensor]]): T pairs of int32 [n]: the slots whose values and states to write, and
            the rows of the store to write them to, no two alike.
        state_dtypes (Sequence[str]): how each state is stored, keys of ``STATE_BYTES``.
        batch (int): number of the batch; with row, column and seed it determines the random numbers.
        seeds (Sequence[int]): T numbers below 2^63.
        first_rows (Sequence[int]): T numbers, where the shard starts in its table.
        first_columns (Sequence[int]): the same of its columns.
        stochastic_rounding (bool): round so that the expected value is the row's; else to the nearest.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Raises:
        TypeError: if a tensor has another dtype.
        ValueError: if shapes do not fit each other or the store's rows.
        IndexError: for a slot or a row that is none, naming the table's number; nothing is written then. On CUDA
            tensors such moves are left out, for to raise would be to wait for the device.
    """
    _check(stores, values, states, moves, state_dtypes)
    if not len(stores) == len(seeds) == len(first_rows) == len(first_columns):
        raise ValueError(
            f"{len(stores)} tables need as many seeds, first rows and first columns, got {len(seeds)}, "
            f"{len(first_rows)} and {len(first_columns)}"
        )
    implementation("write_stored_rows_", backend)(
        stores, values, states, moves, state_dtypes, batch, seeds, first_rows, first_columns, stochastic_rounding
    )


def read_stored_rows_(
    stores: Sequence[BackingStore],
    values: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    moves: Sequence[tuple[Tensor, Tensor]],
    state_dtypes: Sequence[str],
    *,
    backend: str | None = None,
) -> None:
    """Dequantize rows of the stores of T tables into slots of the tables' caches.

    Args:
        stores (Sequence[BackingStore]): T, of the tables or shards.
        values (Sequence[Tensor]): T of float32 [slots, D], contiguous; written.
        states (Sequence[Sequence[Tensor]]): T times float32 [slots, elements] for each optimizer state; written. None
            for a table leaves them out.
        moves (Sequence[Tuple[Tensor, Tensor]]): T pairs of int32 [n]: the slots to write to, no two alike, and the rows
            of the store.
        state_dtypes (Sequence[str]): how each state is stored, keys of ``STATE_BYTES``.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Raises:
        TypeError: if a tensor has another dtype.
        ValueError: if shapes do not fit each other or the store's rows.
        IndexError: for a slot or a row that is none, naming the table's number; nothing is written then. On CUDA
            tensors such moves are left out, for to raise would be to wait for the device.
    """
    _check(stores, values, states, moves, state_dtypes)
    implementation("read_stored_rows_", backend)(stores, values, states, moves, state_dtypes)


def _check(
    stores: Sequence[BackingStore],
    values: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    moves: Sequence[tuple[Tensor, Tensor]],
    state_dtypes: Sequence[str],
) -> None:
    """Raise for what does not fit together; the C++ op checks it again, and the numbers in the moves."""
    if not len(stores) == len(values) == len(states) == len(moves):
        raise ValueError(
            f"{len(stores)} stores, {len(values)} values, {len(states)} states and {len(moves)} moves are not of "
            "equally many tables"
        )
    for dtype in state_dtypes:
        if dtype not in STATE_BYTES:
            raise ValueError(f"a state cannot be stored as {dtype}, but as {', '.join(STATE_BYTES)}")
    for t, (store, value, of_table, (slots, rows)) in enumerate(zip(stores, values, states, moves, strict=True)):
        if value.dtype != torch.float32 or any(state.dtype != torch.float32 for state in of_table):
            raise TypeError(f"table {t}: values and states must be float32")
        if value.dim() != 2 or value.shape[1] % 2 or any(s.dim() != 2 or len(s) != len(value) for s in of_table):
            raise ValueError(
                f"table {t}: values must be [slots, D], D even, and states [slots, elements], got "
                f"{[list(tensor.shape) for tensor in (value, *of_table)]}"
            )
        if slots.dtype != torch.int32 or rows.dtype != torch.int32:
            raise TypeError(f"table {t}: slots and rows of moves must be int32, got {slots.dtype} and {rows.dtype}")
        if slots.dim() != 1 or slots.shape != rows.shape:
            raise ValueError(
                f"table {t}: its moves must be [n] slots and [n] rows, got {list(slots.shape)} and {list(rows.shape)}"
            )
        if of_table and len(of_table) != len(state_dtypes):
            raise ValueError(f"table {t}: it has {len(of_table)} states, there are {len(state_dtypes)} state_dtypes")
        layout = tuple((state.shape[1], dtype) for state, dtype in zip(of_table, state_dtypes, strict=bool(of_table)))
        for bits, held in ((4, store.rows4), (8, store.rows8)):
            row = StoredRow(bits, value.shape[1], layout)
            # Without states here the store may hold some.
            if len(held) and not (held.shape[1] == row.bytes or (not of_table and held.shape[1] > row.bytes)):
                raise ValueError(f"table {t}: its {bits}-bit rows have {held.shape[1]} bytes, not {row.bytes}")


def _flat(
    stores: Sequence[BackingStore],
    values: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    moves: Sequence[tuple[Tensor, Tensor]],
    state_dtypes: Sequence[str],
) -> tuple[Any, ...]:
    """The arguments as lists over tables, as the compiled ops take them."""
    rows4, rows8, is_wide, wide_before = ([store[k] for store in stores] for k in range(4))
    of_tables = [state for of_table in states for state in of_table]
    slots, rows = ([move[k] for move in moves] for k in range(2))
    counts = [len(of_table) for of_table in states]
    return rows4, rows8, is_wide, wide_before, values, of_tables, counts, slots, rows, state_dtypes


def _write(
    stores: Sequence[BackingStore],
    values: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    moves: Sequence[tuple[Tensor, Tensor]],
    state_dtypes: Sequence[str],
    *arguments: Any,
) -> None:
    torch.ops.torchrec_mpe.write_stored_rows_(*_flat(stores, values, states, moves, state_dtypes), *arguments)


def _read(
    stores: Sequence[BackingStore],
    values: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    moves: Sequence[tuple[Tensor, Tensor]],
    state_dtypes: Sequence[str],
) -> None:
    torch.ops.torchrec_mpe.read_stored_rows_(*_flat(stores, values, states, moves, state_dtypes))


def _fake(*arguments: Any) -> None:
    return None


for _op, _reference, _compiled in (
    ("write_stored_rows_", reference.write_stored_rows_, _write),
    ("read_stored_rows_", reference.read_stored_rows_, _read),
):
    register(_op, "reference", _reference)
    if library.is_loaded():
        register(_op, "cpu", _compiled)
        torch.library.register_fake(f"torchrec_mpe::{_op}", _fake)
        torch.library.impl(f"torchrec_mpe::{_op}", "CUDA", triton_backend.CUDA_CACHE[_op])
