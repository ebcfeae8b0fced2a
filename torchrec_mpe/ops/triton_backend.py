"""The Triton backend of the ops: its kernels, and Triton, are imported when one first runs."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.ops.backends import register
from torchrec_mpe.ops.cache_tensors import BackingStore, CacheDirectory
from torchrec_mpe.ops.reference import quantized_embedding_bag as reference


@lru_cache
def _kernel(op: str, part: str = "", module: str = "") -> Callable[..., Any]:
    try:
        import_module("triton")
    except ImportError as error:
        raise ImportError(
            f"backend triton of op {op} needs Triton: install the release that your torch was built with, "
            "`pip install triton==3.6.0` for torch 2.11, `triton==3.7.0` for torch 2.13"
        ) from error
    function: Callable[..., Any] = getattr(import_module(f"torchrec_mpe.ops.triton.{module or op}"), op + part)
    return function


def packed_embedding_bag(*arguments: Any, **options: Any) -> Any:
    """See :func:`torchrec_mpe.ops.triton.packed_embedding_bag.packed_embedding_bag`."""
    return _kernel("packed_embedding_bag")(*arguments, **options)


def expected_quantization(*arguments: Any) -> Any:
    """See :func:`torchrec_mpe.ops.triton.expected_quantization.expected_quantization`."""
    return _kernel("expected_quantization")(*arguments)


def fixed_quantization(*arguments: Any) -> Any:
    """See :func:`torchrec_mpe.ops.triton.fixed_quantization.fixed_quantization`."""
    return _kernel("fixed_quantization")(*arguments)


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


def _expected_forward(
    rows: Tensor,
    probabilities: Tensor,
    group: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
) -> Tensor:
    _check_table(zero_rows, table)
    result: Tensor = _kernel("expected_quantization", "_forward")(
        rows, probabilities, group, alpha, beta, zero_rows, table, tuple(candidate_bits), gradient_scale
    )
    return result


def _fixed_forward(
    rows: Tensor,
    candidate: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
) -> Tensor:
    _check_table(zero_rows, table)
    result: Tensor = _kernel("fixed_quantization", "_forward")(
        rows, candidate, alpha, beta, zero_rows, table, tuple(candidate_bits), gradient_scale
    )
    return result


def _expected_backward(
    grad: Tensor,
    rows: Tensor,
    probabilities: Tensor,
    group: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
) -> tuple[Tensor, ...]:
    _check_table(zero_rows, table)
    _check_grad(grad, rows.shape)
    *gradients, of_zero_rows = _kernel("expected_quantization", "_backward")(
        grad, rows, probabilities, group, alpha, beta, zero_rows, table, tuple(candidate_bits), gradient_scale
    )
    return *gradients, rows.new_empty(0) if of_zero_rows is None else of_zero_rows, rows.new_empty(0)


def _fixed_backward(
    grad: Tensor,
    rows: Tensor,
    candidate: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
) -> tuple[Tensor, ...]:
    _check_table(zero_rows, table)
    _check_grad(grad, rows.shape)
    of_rows, *gradients, of_zero_rows = _kernel("fixed_quantization", "_backward")(
        grad, rows, candidate, alpha, beta, zero_rows, table, tuple(candidate_bits), gradient_scale
    )
    of_zero_rows = rows.new_empty(0) if of_zero_rows is None else of_zero_rows
    return of_rows, rows.new_empty(0), *gradients, of_zero_rows, rows.new_empty(0)


def _check_table(zero_rows: Tensor | None, table: Tensor | None) -> None:
    if zero_rows is not None and table is None:
        raise ValueError("zero_rows need one table number a row")


def _check_grad(grad: Tensor, shape: Sequence[int]) -> None:
    if tuple(grad.shape) != tuple(shape):
        raise ValueError(f"grad must be {list(shape)} like the output, not {list(grad.shape)}")


@torch.no_grad()
def _bag_forward(search: bool, rows: Tensor, ids: Tensor, *arguments: Any) -> Tensor:
    pool: Callable[..., Tensor] = reference.expected_embedding_bag if search else reference.fixed_embedding_bag
    *others, _, index, row_offsets = arguments
    gradient_factor = 1.0  # there is no gradient here
    quantize = _expected_forward if search else _fixed_forward
    # int64: rows are counted through all tables.
    return pool(rows, ids.long(), *others, gradient_factor, index, row_offsets, quantize=quantize)


@torch.no_grad()
def _bag_backward(
    search: bool,
    grad: Tensor,
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    first_row: Sequence[int],
    num_rows: Sequence[int],
    table: Sequence[int],
    pooling_mode: Sequence[int],
    side_by_side: bool,
    lines: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """From the gradient of the bags to that of every id's row, then as for rows on their own."""
    *quantizer, weights, factor, index, row_offsets, weights_require_grad = arguments
    probabilities = quantizer[:1] if search else []
    alpha, beta, zero_rows, bits, scale = quantizer[-5:]
    features, dim = len(bags_per_feature), rows.shape[1]
    count = sum(bags_per_feature)
    if side_by_side and features:
        _check_grad(grad, (count // features, features * dim))
        grad = grad.reshape(count // features, features, dim).transpose(0, 1).reshape(count, dim)
    _check_grad(grad, (count, dim))

    ids = ids.long()
    starts, counts = (offsets, bags_per_feature) if row_offsets is None else (row_offsets, [1] * features)
    line = lines[reference.row_numbers(ids, starts, counts, first_row, num_rows)]
    # The first and only "row" of each feature is its table.
    table_of_row = reference.row_numbers(torch.zeros_like(ids), starts, counts, table, [1] * features)
    steps = alpha, beta, zero_rows, None if zero_rows is None else table_of_row, bits, scale
    call = rows, *probabilities, line, *steps

    lengths = offsets.diff().long()
    repeats = torch.tensor(bags_per_feature, dtype=torch.int64, device=rows.device)
    mean = torch.tensor([mode == reference.MEAN for mode in pooling_mode], dtype=torch.bool, device=rows.device)
    divisor = torch.where(mean.repeat_interleave(repeats), lengths.clamp(min=1), 1).to(rows.dtype)
    num_ids = len(ids) if index is None else len(index)
    of_id = (grad / divisor.unsqueeze(1)).repeat_interleave(lengths, dim=0, output_size=num_ids)
    position = None if index is None else index.long() - row_offsets[0]
    of_weights = rows.new_empty(0)
    if weights_require_grad:
        quantized = (_expected_forward if search else _fixed_forward)(*call)
        of_weights = (of_id * (quantized if position is None else quantized[position])).sum(1)
    if weights is not None:
        of_id = of_id * weights.to(rows.dtype).unsqueeze(1)
    of_quantized = of_id if position is None else torch.zeros_like(rows).index_add_(0, position, of_id)
    of_rows, *of_shared, _ = (_expected_backward if search else _fixed_backward)(of_quantized, *call)
    return of_rows, *(gradient * factor for gradient in of_shared), of_weights


CUDA_QUANTIZATION: dict[str, Callable[..., Any]] = {
    "expected_quantization": _expected_forward,
    "expected_quantization_backward": _expected_backward,
    "fixed_quantization": _fixed_forward,
    "fixed_quantization_backward": _fixed_backward,
}
"""The CUDA kernels of the ops of :mod:`torchrec_mpe.ops.quantization`."""

CUDA_EMBEDDING_BAG: dict[str, Callable[..., Any]] = {
    "expected_embedding_bag": partial(_bag_forward, True),
    "expected_embedding_bag_backward": partial(_bag_backward, True),
    "fixed_embedding_bag": partial(_bag_forward, False),
    "fixed_embedding_bag_backward": partial(_bag_backward, False),
    "row_numbers": reference.row_numbers,
    "unique_ids": reference.unique_ids,
}
"""Those of :mod:`torchrec_mpe.ops.quantized_embedding_bag`: pooled by PyTorch, quantized by the Triton kernels."""


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
    expected_quantization,
    fixed_quantization,
    quantize_and_pack,
    assign_cache_slots_,
    write_stored_rows_,
    read_stored_rows_,
):
    register(_function.__name__, "triton", _function)
