"""The lookup of packed tables in pure PyTorch: the definition that every backend is tested against."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_mpe.ops.backends import register
from torchrec_mpe.packing.bitpack import unpack_codes

_SUM, _MEAN = 0, 1
OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@torch.no_grad()
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
    D_offsets: Sequence[int],  # noqa: N803
    feature_table_map: Sequence[int],
    pooling_modes: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    output_dtype: torch.dtype,
    feature_labels: Sequence[str] | None,
) -> Tensor:
    """See :func:`torchrec_mpe.ops.packed_embedding_bag.packed_embedding_bag`."""
    check_call(D_offsets, feature_table_map, pooling_modes, per_sample_weights, output_dtype, rows_per_table.numel())
    check_bags(indices, offsets, len(feature_table_map), per_sample_weights)
    features = len(feature_table_map)
    batch = (offsets.numel() - 1) // features if features else 0
    labels = feature_labels or [f"table {t} (feature {f})" for f, t in enumerate(feature_table_map)]
    spans = offsets[::batch].tolist() if batch else [0] * (features + 1)
    tables_rows = rows_per_table.tolist()
    for f, t in enumerate(feature_table_map):
        check_ids(indices[spans[f] : spans[f + 1]], tables_rows[t], labels[f])

    compute = torch.float64 if output_dtype == torch.float64 else torch.float32
    output = torch.zeros((batch, D_offsets[-1]), dtype=compute, device=payload.device)
    for f, t in enumerate(feature_table_map):
        ids = indices[spans[f] : spans[f + 1]].long()
        remap_offset = int(remap_offsets[t])
        ranks = ids if remap_offset < 0 else remap[remap_offset + ids].long()
        first_run, end_run = int(run_offsets[t]), int(run_offsets[t + 1])
        scales = int(scale_index[t])
        rows = _dequantize(
            payload,
            run_records[first_run:end_run],
            run_starts[first_run:end_run],
            ranks,
            alpha[scales].to(compute),
            beta[int(beta_offsets[scales]) :][: D_offsets[f + 1] - D_offsets[f]].to(compute),
            zero_rows,
            int(zero_row_offsets[t]),
        )
        if per_sample_weights is not None:
            rows *= per_sample_weights[spans[f] : spans[f + 1]].to(compute).unsqueeze(1)
        lengths = offsets[f * batch : (f + 1) * batch + 1].diff().long()
        bags = torch.repeat_interleave(torch.arange(batch, device=indices.device), lengths)
        pooled = output[:, D_offsets[f] : D_offsets[f + 1]]
        pooled.index_add_(0, bags, rows)
        if pooling_modes[f] == _MEAN:
            pooled /= lengths.clamp(min=1).unsqueeze(1)
    return output.to(output_dtype)


def _dequantize(
    payload: Tensor,
    records: Tensor,
    starts: Tensor,
    ranks: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor,
    zero_row_offset: int,
) -> Tensor:
    """Rows of the given ranks of one table, [n, D]."""
    dim = beta.numel()
    record = records[torch.searchsorted(starts.long(), ranks, right=True) - 1]
    row_bytes, bits = record[:, 1] & 0xFFFFFFFF, record[:, 1] >> 32
    addresses = record[:, 0] + ranks * row_bytes
    rows = torch.zeros((ranks.numel(), dim), dtype=beta.dtype, device=payload.device)
    for width in bits.unique().tolist():
        chosen = (bits == width).nonzero().squeeze(1)
        if width == 0:
            if zero_row_offset >= 0:
                rows[chosen] = zero_rows[zero_row_offset : zero_row_offset + dim].to(beta.dtype)
            continue
        positions = torch.arange(-(-dim // 8) * width, device=payload.device)
        codes = unpack_codes(payload[addresses[chosen].unsqueeze(1) + positions], width, dim)
        rows[chosen] = (codes.to(beta.dtype) - (1 << (width - 1))) * alpha[width] + beta
    return rows


def check_call(
    D_offsets: Sequence[int],  # noqa: N803
    feature_table_map: Sequence[int],
    pooling_modes: Sequence[int],
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
    if len(D_offsets) != features + 1 or len(pooling_modes) != features:
        raise ValueError(
            f"{features} features need {features + 1} D_offsets and {features} pooling modes, "
            f"got {len(D_offsets)} and {len(pooling_modes)}"
        )
    if any(not 0 <= t < tables for t in feature_table_map):
        raise ValueError(f"feature_table_map must lie in [0, {tables}), got {list(feature_table_map)}")
    if any(mode not in (_SUM, _MEAN) for mode in pooling_modes):
        raise ValueError(f"pooling modes must be {_SUM} (SUM) or {_MEAN} (MEAN), got {list(pooling_modes)}")
    if per_sample_weights is not None and _MEAN in pooling_modes:
        raise ValueError("MEAN pooling takes no per-sample weights: its divisor would be ambiguous")
    if output_dtype not in OUTPUT_DTYPES:
        raise TypeError(f"output_dtype must be one of {OUTPUT_DTYPES}, got {output_dtype}")


def check_bags(indices: Tensor, offsets: Tensor, features: int, per_sample_weights: Tensor | None) -> None:
    """Check ids, offsets and weights against each other, values of offsets included.

    Raises:
        TypeError: if a dtype is not supported.
        ValueError: if a shape does not fit, or offsets decrease or do not span the ids.
    """
    for name, tensor in (("indices", indices), ("offsets", offsets)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got {list(tensor.shape)}")
    bags = offsets.numel() - 1
    if bags < 0 or (bags % features if features else bags):
        raise ValueError(f"offsets must have {features} * batch + 1 entries, got {offsets.numel()}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != indices.numel():
        raise ValueError(
            f"offsets must go from 0 to the {indices.numel()} ids, got {int(offsets[0])} to {int(offsets[-1])}"
        )
    if bool((offsets.diff() < 0).any()):
        bag = int((offsets.diff() < 0).nonzero()[0])
        raise ValueError(f"offsets must not decrease, they do after bag {bag}")
    if per_sample_weights is not None:
        if not per_sample_weights.is_floating_point():
            raise TypeError(f"per_sample_weights must be floating point, got {per_sample_weights.dtype}")
        if per_sample_weights.shape != indices.shape:
            raise ValueError(f"{indices.numel()} ids come with per_sample_weights {list(per_sample_weights.shape)}")


def check_ids(ids: Tensor, rows: int, label: str) -> None:
    """Check that every id is a row of its table.

    Raises:
        IndexError: naming the table and the first bad id.
    """
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        position = int(((ids < 0) | (ids >= rows)).nonzero()[0])
        raise IndexError(f"{label}: id {int(ids[position])} is not in [0, {rows})")


register("packed_embedding_bag", "reference", packed_embedding_bag)
