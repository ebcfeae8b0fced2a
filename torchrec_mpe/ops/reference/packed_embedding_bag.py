"""The lookup of packed tables in pure PyTorch: the definition that every backend is tested against."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from torchrec_mpe.ops.backends import register
from torchrec_mpe.ops.bags import MEAN
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.check_bags import check_bags, check_call, check_offsets, check_out
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.reference.bitpack import row_bytes, unpack_codes
from torchrec_mpe.ops.reference.component_codes import read_codes
from torchrec_mpe.ops.reference.locate import Located, locate
from torchrec_mpe.ops.reference.run_coding import TRANSFORMED, component_bits, level_count
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
    levels: Tensor,
    levels_offsets: Tensor,
    bases: Tensor,
    bases_offsets: Tensor,
    components: Tensor,
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
        located = locate(
            ids,
            Directory(int(directory_kinds[t])),
            directory[max(int(directory_offsets[t]), 0) :],
            table_rows[t],
            row_bytes(dim, 1),
            run_records[runs],
            run_starts[runs],
        )
        zero_row_offset = int(zero_row_offsets[t])
        zero_row = None if zero_row_offset < 0 else zero_rows[zero_row_offset : zero_row_offset + dim].to(compute)
        table_weights = weights[int(weights_offsets[t]) :]
        if int(bases_offsets[t]) < 0:
            scales = int(scale_index[t])
            of_dim = beta[int(beta_offsets[scales]) :][:dim].to(compute)
            rows = _dequantize(table_weights, located, alpha[scales].to(compute), of_dim, zero_row)
        else:
            count = int(components[t])
            basis = bases[int(bases_offsets[t]) :][: (count + 1) * dim].view(count + 1, dim).to(compute)
            of_table = levels[int(levels_offsets[t]) :].to(compute)
            rows = _decode(table_weights, located, run_records[runs], of_table, basis, zero_row)
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


def _dequantize(weights: Tensor, located: Located, alpha: Tensor, beta: Tensor, zero_row: Tensor | None) -> Tensor:
    """Rows of one uncoded table, [n, D], from where they start and their widths."""
    rows = torch.zeros((located.starts.numel(), beta.numel()), dtype=beta.dtype, device=weights.device)
    for width in located.coding.unique().tolist():
        chosen = (located.coding == width).nonzero().squeeze(1)
        rows[chosen] = _plain(weights, located.starts[chosen], width, alpha[width], beta, zero_row)
    return rows


def _decode(
    weights: Tensor, located: Located, run_records: Tensor, levels: Tensor, basis: Tensor, zero_row: Tensor | None
) -> Tensor:
    """Rows of one coded table, [n, D]; ``levels`` begin with those of its first run."""
    components = len(basis) - 1
    rows = torch.zeros((located.starts.numel(), basis.shape[1]), dtype=basis.dtype, device=weights.device)
    codings = (run_records[:, 1] >> 32 & 0xFFFFFFFF).tolist()
    ends = list(accumulate(level_count(coding, components) for coding in codings))
    for run in located.runs.unique().tolist():
        coding = codings[run]
        chosen = (located.runs == run).nonzero().squeeze(1)
        starts = located.starts[chosen]
        of_run = levels[ends[run] - level_count(coding, components) : ends[run]]
        if not coding & TRANSFORMED:
            step = of_run[0] if coding else levels.new_zeros(())
            rows[chosen] = _plain(weights, starts, coding, step, basis[-1], zero_row)
            continue
        widths = component_bits(coding, components)
        with _rows_lock(weights):
            codes = read_codes(weights, starts, widths)
        coded = [k for k, bits in enumerate(widths) if bits]
        values = codes[:, coded].to(basis.dtype) * of_run[::2] + of_run[1::2]
        rows[chosen] = values @ basis[coded] + basis[-1]
    return rows


def _plain(
    weights: Tensor, starts: Tensor, bits: int, step_size: Tensor, beta: Tensor, zero_row: Tensor | None
) -> Tensor:
    """Rows of one width, [n, D], or what rows of 0 bits read."""
    if bits == 0:
        return torch.zeros_like(beta) if zero_row is None else zero_row
    places = (starts >> 3).unsqueeze(1) + torch.arange(row_bytes(beta.numel(), bits), device=weights.device)
    with _rows_lock(weights):
        packed = weights[places]
    return (unpack_codes(packed, bits, beta.numel()).to(beta.dtype) - (1 << (bits - 1))) * step_size + beta


def _rows_lock(weights: Tensor) -> AbstractContextManager[object]:
    """Held while rows are read that another thread may be writing."""
    if torch.compiler.is_compiling() or weights.device.type != "cpu":
        return nullcontext()
    return ROWS_LOCK


register("packed_embedding_bag", "reference", packed_embedding_bag)
