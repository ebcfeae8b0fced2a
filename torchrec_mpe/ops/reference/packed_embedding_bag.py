"""The lookup of packed tables in pure PyTorch: the definition that every backend is tested against."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from torchrec_mpe.ops.backends import register
from torchrec_mpe.ops.bags import MEAN
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.check_bags import check_bags, check_call, check_offsets, check_out
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.reference.bitpack import row_bytes, unpack_codes
from torchrec_mpe.ops.reference.locate import locate
from torchrec_mpe.ops.reference.update_rows import ROWS_LOCK


@torch.no_grad()
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
    D_offsets: Sequence[int],  # noqa: N803
    feature_table_map: Sequence[int],
    pooling_mode: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None = None,
    output_dtype: torch.dtype = torch.float32,
    bounds_check_mode: int = BoundsCheckMode.FATAL,
    bounds_check_warning: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`torchrec_mpe.ops.packed_embedding_bag.packed_embedding_bag`."""
    features = len(feature_table_map)
    check_call(D_offsets, feature_table_map, pooling_mode, per_sample_weights, output_dtype, rows_per_table.numel())
    check_bags(indices, offsets, features, per_sample_weights)
    mode = BoundsCheckMode(bounds_check_mode)
    if mode != BoundsCheckMode.NONE:
        check_offsets(offsets, indices.numel())
    batch = (offsets.numel() - 1) // features if features else 0
    if out is not None:
        check_out(out, batch, D_offsets[-1], output_dtype, weights.device)
    spans = offsets[::batch].tolist() if batch else [0] * (features + 1)
    table_rows = rows_per_table.tolist()
    ids_of_feature = [indices[first:last].long() for first, last in pairwise(spans)]
    if mode != BoundsCheckMode.NONE:
        # All features before the first row is read: an error leaves nothing half done.
        ids_of_feature = [
            _check_ids(ids, table_rows[t], mode, bounds_check_warning, f"table {t}, feature {f}")
            for f, (t, ids) in enumerate(zip(feature_table_map, ids_of_feature, strict=True))
        ]

    compute = torch.float64 if output_dtype == torch.float64 else torch.float32
    output = torch.zeros((batch, D_offsets[-1]), dtype=compute, device=weights.device)
    for f, t in enumerate(feature_table_map):
        lengths = offsets[f * batch : (f + 1) * batch + 1].diff().long()
        bags = torch.repeat_interleave(torch.arange(batch, device=indices.device), lengths)
        read = ids_of_feature[f] != -1  # -1: a pruned row, which counts for MEAN only
        ids, bags = ids_of_feature[f][read], bags[read]
        dim = D_offsets[f + 1] - D_offsets[f]
        runs = slice(int(run_offsets[t]), int(run_offsets[t + 1]))
        starts, bits = locate(
            ids,
            Directory(int(directory_kinds[t])),
            directory[max(int(directory_offsets[t]), 0) :],
            table_rows[t],
            row_bytes(dim, 1),
            run_records[runs],
            run_starts[runs],
        )
        scales = int(scale_index[t])
        zero_row_offset = int(zero_row_offsets[t])
        rows = _dequantize(
            weights[int(weights_offsets[t]) :],
            starts,
            bits,
            alpha[scales].to(compute),
            beta[int(beta_offsets[scales]) :][:dim].to(compute),
            None if zero_row_offset < 0 else zero_rows[zero_row_offset : zero_row_offset + dim].to(compute),
        )
        if per_sample_weights is not None:
            rows *= per_sample_weights[spans[f] : spans[f + 1]][read].to(compute).unsqueeze(1)
        pooled = output[:, D_offsets[f] : D_offsets[f + 1]]
        pooled.index_add_(0, bags, rows)
        if pooling_mode[f] == MEAN:
            pooled /= lengths.clamp(min=1).unsqueeze(1)
    return output.to(output_dtype) if out is None else out.copy_(output)


def _check_ids(ids: Tensor, rows: int, mode: BoundsCheckMode, warning: Tensor | None, label: str) -> Tensor:
    """The ids to read, -1 for pruned rows: row 0 in place of bad ids, unless the mode is FATAL."""
    bad = (ids < -1) | (ids >= rows)
    if mode == BoundsCheckMode.FATAL and bool(bad.any()):
        raise IndexError(f"{label}: id {int(ids[bad][0])} is not in [0, {rows})")
    if mode == BoundsCheckMode.WARNING and warning is not None:
        warning += bad.sum()
    return ids.masked_fill(bad, 0)


def _dequantize(
    weights: Tensor, starts: Tensor, bits: Tensor, alpha: Tensor, beta: Tensor, zero_row: Tensor | None
) -> Tensor:
    """Rows of one table, [n, D], from where they start and their widths."""
    dim = beta.numel()
    rows = torch.zeros((starts.numel(), dim), dtype=beta.dtype, device=weights.device)
    for width in bits.unique().tolist():
        chosen = (bits == width).nonzero().squeeze(1)
        if width == 0:
            if zero_row is not None:
                rows[chosen] = zero_row
            continue
        places = starts[chosen].unsqueeze(1) + torch.arange(row_bytes(dim, width), device=weights.device)
        codes = unpack_codes(_read(weights, places), width, dim)
        rows[chosen] = (codes.to(beta.dtype) - (1 << (width - 1))) * alpha[width] + beta
    return rows


def _read(weights: Tensor, places: Tensor) -> Tensor:
    """``weights[places]``, none of whose rows another thread is writing."""
    if torch.compiler.is_compiling() or weights.device.type != "cpu":
        return weights[places]
    with ROWS_LOCK:
        return weights[places]


register("packed_embedding_bag", "reference", packed_embedding_bag)
