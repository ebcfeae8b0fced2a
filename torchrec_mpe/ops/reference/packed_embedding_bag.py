"""Lookup in packed tables in pure PyTorch: the definition that every backend is tested against."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_mpe.ops.backends import register
from torchrec_mpe.packing.bitpack import unpack_codes


def packed_embedding_bag(
    tensors: Sequence[Tensor],
    table_names: Sequence[str],
    D_offsets: Sequence[int],  # noqa: N803  (FBGEMM's name)
    feature_table_map: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    mean: bool,
    per_sample_weights: Tensor | None,
    output_dtype: torch.dtype,
) -> Tensor:
    """See :func:`torchrec_mpe.ops.packed_embedding_bag`."""
    features = len(feature_table_map)
    bags = (offsets.numel() - 1) // features if features else 0
    compute_dtype = torch.float64 if output_dtype == torch.float64 else torch.float32
    out = torch.zeros(bags, D_offsets[-1], dtype=compute_dtype, device=indices.device)
    bounds = offsets[:: bags or 1].tolist() if bags else [0] * (features + 1)
    for f, t in enumerate(feature_table_map):
        dims = slice(D_offsets[f], D_offsets[f + 1])
        ids = indices[bounds[f] : bounds[f + 1]].long()
        rows = _rows(tensors, table_names[t], t, D_offsets[f + 1] - D_offsets[f], ids, compute_dtype)
        lengths = offsets[f * bags : (f + 1) * bags + 1].diff().long()
        if per_sample_weights is not None:
            rows *= per_sample_weights[bounds[f] : bounds[f + 1]].to(compute_dtype).unsqueeze(1)
        pooled = torch.zeros(bags, rows.shape[1], dtype=compute_dtype, device=indices.device)
        pooled.index_add_(0, torch.repeat_interleave(lengths, output_size=len(ids)), rows)
        if mean:
            pooled /= lengths.clamp(min=1).unsqueeze(1)
        out[:, dims] = pooled
    return out.to(output_dtype)


def _rows(
    tensors: Sequence[Tensor], name: str, t: int, dim: int, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """Dequantized rows of one table, [N, dim]."""
    (
        payload, run_records, run_starts, run_offsets, rows_per_table, remap, remap_offsets,
        alpha, beta, beta_offsets, scale_index, zero_rows, zero_row_offsets,
    ) = tensors  # fmt: skip
    num_embeddings = int(rows_per_table[t])
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_embeddings):
        raise IndexError(
            f"table {name}: ids run from {int(ids.min())} to {int(ids.max())}, num_embeddings is {num_embeddings}"
        )
    first = int(remap_offsets[t])
    ranks = remap[first + ids].long() if first >= 0 else ids
    runs = slice(int(run_offsets[t]), int(run_offsets[t + 1]))
    run = torch.searchsorted(run_starts[runs].long(), ranks, right=True) - 1
    record = run_records[runs][run]
    row_bytes, bits = record[:, 1] & 0xFFFFFFFF, record[:, 1] >> 32
    scales = int(scale_index[t])
    start = int(beta_offsets[scales])
    offset = beta[start : start + dim].to(dtype)
    out = torch.empty(len(ids), dim, dtype=dtype, device=ids.device)
    for width in torch.unique(bits).tolist():
        chosen = (bits == width).nonzero().squeeze(1)
        if width == 0:
            zero = int(zero_row_offsets[t])
            out[chosen] = zero_rows[zero : zero + dim].to(dtype) if zero >= 0 else 0
            continue
        size = int(row_bytes[chosen[0]])
        byte = record[chosen, 0] + ranks[chosen] * size
        packed = payload[byte.unsqueeze(1) + torch.arange(size, device=ids.device)]
        codes = unpack_codes(packed, width, dim).to(dtype) - 2 ** (width - 1)
        out[chosen] = codes * alpha[scales, width].to(dtype) + offset
    return out


register("packed_embedding_bag", "reference", packed_embedding_bag)
