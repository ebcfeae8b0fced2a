"""Checks of a lookup's arguments that its backends share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_mpe.ops.bags import MEAN, SUM

OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_call(
    D_offsets: Sequence[int],  # noqa: N803
    feature_table_map: Sequence[int],
    pooling_mode: Sequence[int],
    per_sample_weights: Tensor | None,
    output_dtype: torch.dtype,
    tables: int,
) -> None:
    """Check what does not depend on the batch.

    Raises:
        TypeError: if the output dtype is not supported.
        ValueError: if the features' columns, tables and pooling modes do not fit each other, or MEAN is weighted.
    """
    features = len(feature_table_map)
    if len(D_offsets) != features + 1 or len(pooling_mode) != features:
        raise ValueError(
            f"{features} features need {features + 1} D_offsets and {features} pooling modes, "
            f"got {len(D_offsets)} and {len(pooling_mode)}"
        )
    if any(not 0 <= t < tables for t in feature_table_map):
        raise ValueError(f"feature_table_map must lie in [0, {tables}), got {list(feature_table_map)}")
    if any(mode not in (SUM, MEAN) for mode in pooling_mode):
        raise ValueError(f"pooling modes must be {SUM} (SUM) or {MEAN} (MEAN), got {list(pooling_mode)}")
    if per_sample_weights is not None and MEAN in pooling_mode:
        raise ValueError("MEAN pooling takes no per-sample weights: its divisor would be ambiguous")
    if output_dtype not in OUTPUT_DTYPES:
        raise TypeError(f"output_dtype must be one of {OUTPUT_DTYPES}, got {output_dtype}")


def check_bags(indices: Tensor, offsets: Tensor, features: int, per_sample_weights: Tensor | None) -> None:
    """Check the dtypes and shapes of ids, offsets and weights against each other.

    Raises:
        TypeError: if a dtype is not supported.
        ValueError: if a shape does not fit.
    """
    for name, tensor in (("indices", indices), ("offsets", offsets)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got {list(tensor.shape)}")
    bags = offsets.numel() - 1
    if bags < 0 or (bags % features if features else bags):
        raise ValueError(f"offsets must have {features} * batch + 1 entries, got {offsets.numel()}")
    if per_sample_weights is not None:
        if not per_sample_weights.is_floating_point():
            raise TypeError(f"per_sample_weights must be floating point, got {per_sample_weights.dtype}")
        if per_sample_weights.shape != indices.shape:
            raise ValueError(f"{indices.numel()} ids come with per_sample_weights {list(per_sample_weights.shape)}")


def check_offsets(offsets: Tensor, ids: int) -> None:
    """Check the values of offsets.

    Raises:
        ValueError: if they decrease or do not go from 0 to the number of ids.
    """
    if int(offsets[0]) != 0 or int(offsets[-1]) != ids:
        raise ValueError(f"offsets must go from 0 to the {ids} ids, got {int(offsets[0])} to {int(offsets[-1])}")
    if bool((offsets.diff() < 0).any()):
        bag = int((offsets.diff() < 0).nonzero()[0])
        raise ValueError(f"offsets must not decrease, they do after bag {bag}")


def check_out(out: Tensor, batch: int, columns: int, output_dtype: torch.dtype, device: torch.device) -> None:
    """Check the tensor that the result is written to.

    Raises:
        TypeError: if its dtype is not ``output_dtype``.
        ValueError: if its shape, memory layout or device does not fit.
    """
    if out.dtype != output_dtype:
        raise TypeError(f"out must be {output_dtype}, got {out.dtype}")
    if tuple(out.shape) != (batch, columns) or not out.is_contiguous() or out.device != device:
        raise ValueError(
            f"out must be [{batch}, {columns}], contiguous and on {device}, got {list(out.shape)} on {out.device}"
        )
