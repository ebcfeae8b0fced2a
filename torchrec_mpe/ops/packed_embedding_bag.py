"""The lookup of packed tables."""

from collections.abc import Sequence

import torch
from torch import Tensor

import torchrec_mpe.ops.reference.packed_embedding_bag  # noqa: F401  (the import registers the reference)
from torchrec_mpe.ops.backends import implementation


def packed_embedding_bag(
    payload: Tensor,
    run_records: Tensor,
    run_starts: Tensor,
    run_offsets: Tensor,
    rows_per_table: Tensor,
    remap: Tensor,
    remap_offsets: Tensor,
    alpha: Tensor,
    beta: Tensor,
    beta_offsets: Tensor,
    scale_index: Tensor,
    zero_rows: Tensor,
    zero_row_offsets: Tensor,
    D_offsets: Sequence[int],  # noqa: N803  (FBGEMM's name)
    feature_table_map: Sequence[int],
    pooling_modes: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None = None,
    output_dtype: torch.dtype = torch.float32,
    feature_labels: Sequence[str] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Look up and pool the rows of F features in T packed tables, like FBGEMM's inference TBE.

    Per bag: ``out = sum_i w_i * (alpha_b * q_i + beta)`` over rows of ``b > 0`` bits, plus ``w_i * zero_row`` for
    0-bit rows; MEAN divides by the number of ids of the bag. An empty bag is zeros. Nothing requires a gradient.
    Source: MPE (arXiv 2409.20305) for the quantizer, LSQ+ (arXiv 2004.09576).

    Args:
        payload, run_records, run_starts, run_offsets, rows_per_table, remap, remap_offsets, alpha, beta, beta_offsets,
            scale_index, zero_rows, zero_row_offsets (Tensor): the tensors of
            :class:`torchrec_mpe.packing.PackedTables`, which draws their layout.
        D_offsets (Sequence[int]): F + 1 columns, where each feature's output starts; the last is total_D.
        feature_table_map (Sequence[int]): F tables.
        pooling_modes (Sequence[int]): F of FBGEMM's PoolingMode values, 0 SUM or 1 MEAN.
        indices (Tensor): int32 or int64 [N], row ids, feature by feature, bag by bag.
        offsets (Tensor): int32 or int64 [F * B + 1], where each bag starts in ``indices``.
        per_sample_weights (Optional[Tensor]): floating point [N].
        output_dtype (torch.dtype): float32, float16 or bfloat16, computed in float32; float64 computes in float64.
        feature_labels (Optional[Sequence[str]]): what errors call each feature; default "table t (feature f)" by index.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Returns:
        Tensor: [B, total_D], ``output_dtype``.

    Raises:
        IndexError: naming the table, if an id is not a row of it; before any row is read.
        TypeError: if ids, offsets, weights or the output have a dtype that is not supported.
        ValueError: if offsets decrease or do not span the ids, shapes do not fit, or MEAN is weighted.
    """
    run = implementation("packed_embedding_bag", backend)
    result: Tensor = run(
        payload,
        run_records,
        run_starts,
        run_offsets,
        rows_per_table,
        remap,
        remap_offsets,
        alpha,
        beta,
        beta_offsets,
        scale_index,
        zero_rows,
        zero_row_offsets,
        D_offsets,
        feature_table_map,
        pooling_modes,
        indices,
        offsets,
        per_sample_weights,
        output_dtype,
        feature_labels,
    )
    return result
