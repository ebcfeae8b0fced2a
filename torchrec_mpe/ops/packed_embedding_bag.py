"""The lookup of packed tables."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import torchrec_mpe.ops.reference.packed_embedding_bag  # noqa: F401  (registers the reference)
from torchrec_mpe.ops import library
from torchrec_mpe.ops.backends import chosen_backend, implementation, register
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.triton_backend import packed_embedding_bag as triton_packed_embedding_bag


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
    D_offsets: Sequence[int],  # noqa: N803  (FBGEMM's name)
    feature_table_map: Sequence[int],
    pooling_mode: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None = None,
    output_dtype: torch.dtype = torch.float32,
    bounds_check_mode: int = BoundsCheckMode.FATAL,
    bounds_check_warning: Tensor | None = None,
    *,
    out: Tensor | None = None,
    feature_labels: Sequence[str] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Look up and pool the rows of F features in T packed tables, like FBGEMM's inference TBE.

    Per bag: ``out = sum_i w_i * (alpha_b * q_i + beta)`` over rows of ``b > 0`` bits, plus ``w_i * zero_row`` for
    0-bit rows; MEAN divides by the number of ids of the bag. An empty bag is zeros. Nothing requires a gradient.
    Source: MPE (arXiv 2409.20305) for the quantizer, LSQ+ (arXiv 2004.09576).

    A transformed row of a coded table adds ``w_i * (sum_k (scale_k * code_k + offset_k) * basis_k + mean)``.

    Args:
        weights, weights_offsets, rows_per_table, run_records, run_starts, run_offsets, directory_kinds, directory,
            directory_offsets, alpha, beta, beta_offsets, scale_index, zero_rows, zero_row_offsets, levels,
            levels_offsets, bases, bases_offsets, components (Tensor): the tensors of
            :class:`torchrec_mpe.packing.packed_tables.PackedTables`, which draws their layout.
        D_offsets (Sequence[int]): F + 1 columns, where each feature's output starts; the last is total_D.
        feature_table_map (Sequence[int]): F tables.
        pooling_mode (Sequence[int]): F of FBGEMM's PoolingMode values, 0 SUM or 1 MEAN.
        indices (Tensor): int32 or int64 [N], row ids, feature by feature, bag by bag.
        offsets (Tensor): int32 or int64 [F * B + 1], where each bag starts in ``indices``.
        per_sample_weights (Optional[Tensor]): floating point [N].
        output_dtype (torch.dtype): float32, float16 or bfloat16, computed in float32; or float64, computed in float64,
            which the C++ kernels of backend "cpu" do not have: without a choice of backend, CPU tensors go to the
            reference.
        bounds_check_mode (int): a :class:`BoundsCheckMode`.
        bounds_check_warning (Optional[Tensor]): int64 [1], to which mode WARNING adds the number of bad ids.
        out (Optional[Tensor]): [B, total_D] of ``output_dtype``, contiguous, to write the result to.
        feature_labels (Optional[Sequence[str]]): what errors call each feature; default "table t, feature f" by index.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Returns:
        Tensor: [B, total_D], ``output_dtype``; ``out`` if given.

    Raises:
        IndexError: in mode FATAL, naming table and feature, if an id is not a row of its table; no such id is read.
        TypeError: if ids, offsets, weights or the output have a dtype that is not supported.
        ValueError: if offsets decrease or do not span the ids, shapes do not fit, MEAN is weighted, or a table's
            directory leads outside its rows.
    """
    if backend is None and output_dtype == torch.float64 and weights.device.type == "cpu":
        backend = chosen_backend() or "reference"
    run = implementation("packed_embedding_bag", backend)
    try:
        result: Tensor = run(
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
            levels,
            levels_offsets,
            bases,
            bases_offsets,
            components,
            D_offsets,
            feature_table_map,
            pooling_mode,
            indices,
            offsets,
            None if per_sample_weights is None else per_sample_weights.detach(),
            output_dtype,
            bounds_check_mode,
            bounds_check_warning,
            out,
        )
    except (IndexError, ValueError) as error:
        if feature_labels is None:
            raise
        raise _labelled(error, feature_labels) from None
    return result


def _labelled(error: IndexError | ValueError, labels: Sequence[str]) -> IndexError | ValueError:
    """The error with the feature's label in place of its number."""
    found = re.match(r"table \d+, feature (\d+): (.*)", str(error).splitlines()[0])
    return type(error)(f"{labels[int(found[1])]}: {found[2]}") if found else error


def _compiled(weights: Tensor, *arguments: Any) -> Tensor:
    """The compiled op, through which tensors on CUDA come to Triton."""
    *rest, output_dtype, mode, warning, out = arguments
    if out is None:
        # Inductor fails on the op that may write to a counter where there is none.
        ops = torch.ops.torchrec_mpe
        result: Tensor = (
            ops.packed_embedding_bag(weights, *rest, output_dtype, mode)
            if warning is None
            else ops.packed_embedding_bag_counting(weights, *rest, output_dtype, mode, warning)
        )
        return result
    torch.ops.torchrec_mpe.packed_embedding_bag_out(weights, *rest, output_dtype, mode, warning, out=out)
    assert isinstance(out, Tensor)
    return out


def _fake(weights: Tensor, *arguments: Any) -> Tensor:
    columns, features, offsets = arguments[19], len(arguments[20]), arguments[23]
    dtype = arguments[25]
    batch = (offsets.numel() - 1) // features if features else 0
    return weights.new_empty((batch, columns[-1]), dtype=dtype)


def _fake_out(*arguments: Any, out: Tensor) -> None:
    return None


def _cuda(weights: Tensor, *arguments: Any) -> Tensor:
    # The dispatcher leaves out trailing arguments that have their defaults. Triton launches on the current device.
    with torch.cuda.device_of(weights):
        result: Tensor = triton_packed_embedding_bag(weights, *arguments)
    return result


def _cuda_out(weights: Tensor, *arguments: Any, out: Tensor) -> None:
    with torch.cuda.device_of(weights):
        triton_packed_embedding_bag(weights, *arguments, out=out)


if library.is_loaded():
    register("packed_embedding_bag", "cpu", _compiled)
    for _name in ("packed_embedding_bag", "packed_embedding_bag_counting"):
        torch.library.register_fake(f"torchrec_mpe::{_name}", _fake)
        torch.library.impl(f"torchrec_mpe::{_name}", "CUDA", _cuda)
    torch.library.register_fake("torchrec_mpe::packed_embedding_bag_out", _fake_out)
    torch.library.impl("torchrec_mpe::packed_embedding_bag_out", "CUDA", _cuda_out)
