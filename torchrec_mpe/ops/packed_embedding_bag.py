"""Table-batched lookup in packed tables."""

from collections.abc import Sequence

import torch
from torch import Tensor

import torchrec_mpe.ops.reference.packed_embedding_bag  # noqa: F401  (registers the reference)
from torchrec_mpe.ops.backends import implementation
from torchrec_mpe.packing.packed_tables import PackedTables

OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def packed_embedding_bag(
    tables: PackedTables,
    feature_table_map: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    *,
    mean: bool = False,
    per_sample_weights: Tensor | None = None,
    output_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Look up, dequantize and pool the bags of F features, in the conventions of FBGEMM's inference TBE.

    ``out[b, feature f] = sum_i w_i * (codes_i * alpha[bits_i] + beta)`` over the ids i of bag (f, b), a 0-bit row giving
    its table's 0-bit vector.

    Args:
        tables (PackedTables): T tables in one set of buffers.
        feature_table_map (Sequence[int]): F table numbers.
        indices (Tensor): int32 or int64 [N], row ids, feature after feature.
        offsets (Tensor): int32 or int64 [F * B + 1], where each bag starts in ``indices``, and N.
        mean (bool): divide each bag by its number of ids; not with weights.
        per_sample_weights (Optional[Tensor]): floating [N].
        output_dtype (torch.dtype): float32, float16, bfloat16; float64 computes in float64, for tests.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Returns:
        Tensor: ``output_dtype`` [B, sum of the features' embedding dimensions]; an empty bag gives zeros.

    Raises:
        IndexError: an id is out of its table's range, or offsets do not rise from 0 to N; nothing was read then.
        TypeError: ids or offsets are no integers.
        ValueError: weighted mean, or shapes that do not fit.

    Example::

        packed = pack_tables([TableToPack("t", widths, rows, alpha, beta)])
        packed_embedding_bag(packed, [0], torch.tensor([3, 1, 4]), torch.tensor([0, 2, 2, 3]))   # [3, D], bag 1 is zeros
    """
    if mean and per_sample_weights is not None:
        raise ValueError("weighted mean pooling is not defined: use sum pooling with weights already divided")
    if output_dtype not in OUTPUT_DTYPES:
        raise ValueError(f"output_dtype must be one of {OUTPUT_DTYPES}, got {output_dtype}")
    for name, tensor in (("indices", indices), ("offsets", offsets)):
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != 1:
            raise TypeError(f"{name} must be int32 or int64 of one dimension, got {tensor.dtype} {list(tensor.shape)}")
    features = len(feature_table_map)
    if features == 0 or any(not 0 <= t < len(tables.tables) for t in feature_table_map):
        raise ValueError(f"feature_table_map must name tables 0 to {len(tables.tables) - 1}, got {feature_table_map}")
    if offsets.numel() == 0 or (offsets.numel() - 1) % features:
        raise ValueError(f"offsets must hold one entry a bag of {features} features and one more: {offsets.numel()}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != indices.numel() or bool((offsets.diff() < 0).any()):
        raise IndexError(f"offsets must rise from 0 to the {indices.numel()} indices")
    if per_sample_weights is not None and per_sample_weights.shape != indices.shape:
        raise ValueError(f"per_sample_weights must be [{indices.numel()}], got {list(per_sample_weights.shape)}")
    d_offsets = [0]
    for t in feature_table_map:
        d_offsets.append(d_offsets[-1] + tables.tables[t].embedding_dim)
    result: Tensor = implementation("packed_embedding_bag", backend)(
        list(tables.tensors().values()),
        [table.name for table in tables.tables],
        d_offsets,
        list(feature_table_map),
        indices,
        offsets,
        mean,
        per_sample_weights,
        output_dtype,
    )
    return result
