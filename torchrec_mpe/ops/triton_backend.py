"""The Triton backend of the ops: its kernels, and Triton, are imported when one first runs."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.ops.backends import register
from torchrec_mpe.ops.bags import Arguments
from torchrec_mpe.ops.cache_tensors import BackingStore, CacheDirectory
from torchrec_mpe.ops.reference import quantized_embedding_bag as reference


@lru_cache
def _kernel(op: str, module: str = "") -> Callable[..., Any]:
    try:
        import_module("triton")
    except ImportError as error:
        raise ImportError(
            f"backend triton of op {op} needs Triton: install the release that your torch was built with, "
            "`pip install triton==3.6.0` for torch 2.11, `triton==3.7.0` for torch 2.13"
        ) from error
    function: Callable[..., Any] = getattr(import_module(f"torchrec_mpe.ops.triton.{module or op}"), op)
    return function


def packed_embedding_bag(*arguments: Any, **options: Any) -> Any:
    """See :func:`torchrec_mpe.ops.triton.packed_embedding_bag.packed_embedding_bag`."""
    return _kernel("packed_embedding_bag")(*arguments, **options)


def quantize_and_pack(*arguments: Any) -> Any:
    """See :func:`torchrec_mpe.ops.triton.quantize_and_pack.quantize_and_pack`."""
    return _kernel("quantize_and_pack")(*arguments)


def assign_cache_slots_(*arguments: Any) -> Any:
    """See :func:`torchrec_mpe.ops.triton.cache_slots.assign_cache_slots_`."""
    return _kernel("assign_cache_slots_", module="cache_slots")(*arguments)


def write_stored_rows_(*arguments: Any) -> None:
    """See :func:`torchrec_mpe.ops.triton.stored_rows.write_stored_rows_`."""
    _kernel("write_stored_rows_", module="stored_rows")(*arguments)


def read_stored_rows_(*arguments: Any) -> None:
    """See :func:`torchrec_mpe.ops.triton.stored_rows.read_stored_rows_`."""
    _kernel("read_stored_rows_", module="stored_rows")(*arguments)


# What the dispatcher runs for CUDA tensors, below autograd. It leaves out trailing arguments that equal a default of
# the schema; the schemas of these ops have none.


@torch.no_grad()
def quantized_embedding_bag(*arguments: Any) -> Tensor:
    """Pooled by PyTorch, quantized by the Triton kernels, without a gradient."""
    return reference.quantized_embedding_bag(Arguments.of(*arguments), _kernel("quantize_rows"))


@torch.no_grad()
def quantized_embedding_bag_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients, empty for what there is not."""
    *flat, weights_require_grad = arguments
    call = Arguments.of(*flat)
    kernels = _kernel("quantize_rows"), _kernel("quantize_rows_backward", module="quantize_rows")
    gradients = reference.quantized_embedding_bag_backward(grad, call, weights_require_grad, *kernels)
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in gradients)


CUDA_EMBEDDING_BAG: dict[str, Callable[..., Any]] = {
    "quantized_embedding_bag": quantized_embedding_bag,
    "quantized_embedding_bag_backward": quantized_embedding_bag_backward,
    "row_numbers": reference.row_numbers,
    "unique_ids": reference.unique_ids,
}
"""The CUDA kernels of the ops of :mod:`torchrec_mpe.ops.quantized_embedding_bag`."""


def _assign_flat(*arguments: Any) -> tuple[Tensor, list[Tensor], list[int]]:
    """:func:`assign_cache_slots_` with six lists of tensors in place of the directories, and one of moves."""
    fields, others = arguments[:6], arguments[6:]
    directories = [CacheDirectory(*of_table) for of_table in zip(*fields, strict=True)]
    slots, moves, needed = assign_cache_slots_(directories, *others)
    return slots, [tensor for of_table in moves for tensor in of_table], needed


def _move_flat(
    move: Callable[..., None],
    rows4: Sequence[Tensor],
    rows8: Sequence[Tensor],
    is_wide: Sequence[Tensor],
    wide_before: Sequence[Tensor],
    values: Sequence[Tensor],
    states: Sequence[Tensor],
    states_per_table: Sequence[int],
    slots: Sequence[Tensor],
    rows: Sequence[Tensor],
    *arguments: Any,
) -> None:
    """:func:`write_stored_rows_` or :func:`read_stored_rows_` with lists of tensors."""
    stores = [BackingStore(*of_table) for of_table in zip(rows4, rows8, is_wide, wide_before, strict=True)]
    if sum(states_per_table) != len(states):
        raise ValueError(f"the tables have {sum(states_per_table)} states, got {len(states)}")
    first = [0, *accumulate(states_per_table)]
    of_tables = [states[start:stop] for start, stop in pairwise(first)]
    move(stores, values, of_tables, list(zip(slots, rows, strict=True)), *arguments)


CUDA_CACHE: dict[str, Callable[..., Any]] = {
    "assign_cache_slots_": _assign_flat,
    "write_stored_rows_": partial(_move_flat, write_stored_rows_),
    "read_stored_rows_": partial(_move_flat, read_stored_rows_),
}
"""Those of :mod:`torchrec_mpe.ops.cache_slots` and :mod:`torchrec_mpe.ops.stored_rows`. Where a store lies in pinned
host memory the dispatcher takes them too, for the cache's tensors."""

for _function in (
    packed_embedding_bag,
    quantize_and_pack,
    assign_cache_slots_,
    write_stored_rows_,
    read_stored_rows_,
):
    register(_function.__name__, "triton", _function)
