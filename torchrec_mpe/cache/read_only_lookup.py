"""Looking rows up without changing cache or store: evaluation."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from torchrec_mpe.ops.cache_tensors import WAYS, BackingStore, CacheDirectory
from torchrec_mpe.ops.stored_rows import read_stored_rows_
from torchrec_mpe.upstream.variable_batches import rank_after_rank


def slots_of_rows(directory: CacheDirectory, num_sets: int, rows: Tensor) -> Tensor:
    """The slot of each of some distinct rows, int64 [n], -1 for rows that are only in the store."""
    tags = directory.slot_rows
    in_sets = tags[: WAYS * num_sets].view(num_sets, WAYS)
    sets = rows % num_sets
    found, way = (in_sets[sets] == rows.int()[:, None]).max(1)
    slots = torch.where(found, sets * WAYS + way, -1)
    spilled, order = tags[WAYS * num_sets :].long().sort()
    if len(spilled):
        at = torch.searchsorted(spilled, rows).clamp(max=len(spilled) - 1)
        slots = torch.where(spilled[at] == rows, WAYS * num_sets + order[at], slots)
    return slots


@torch.no_grad()
def current_rows(store: BackingStore, directory: CacheDirectory, num_sets: int, values: Tensor, rows: Tensor) -> Tensor:
    """The values of some distinct rows, float32 [n, D]: the cached copy where there is one, else the store's.

    Args:
        store (BackingStore): of the table.
        directory (CacheDirectory): of its cache.
        num_sets (int): of its cache.
        values (Tensor): float32 [slots, D].
        rows (Tensor): int64 [n].
    """
    slots = slots_of_rows(directory, num_sets, rows)
    out = values[slots.clamp(min=0)]
    missing = (slots < 0).nonzero().squeeze(1)
    read_stored_rows_([store], [out], [[]], [(missing.int(), rows[missing].int())], [])
    return out


def look_up(
    rows_of_table: Callable[[int, Tensor], Tensor],
    indices: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    feature_table_map: Sequence[int],
    mode: PoolingMode,
    per_sample_weights: Tensor | None,
    bags_per_rank: list[list[int]] | None,
) -> Tensor:
    """Pooled embeddings in the form in which FBGEMM's TBE gives them, float32.

    Args:
        rows_of_table (Callable[[int, Tensor], Tensor]): float32 [n, D] of a table and some distinct rows, int64 [n].
        indices (Tensor): [N], rows of their tables.
        offsets (Tensor): [bags + 1].
        bags_per_feature (Sequence[int]): their sum is the number of bags.
        feature_table_map (Sequence[int]): as FBGEMM's.
        mode (PoolingMode): as FBGEMM's.
        per_sample_weights (Optional[Tensor]): [N].
        bags_per_rank (Optional[List[List[int]]]): FBGEMM's ``batch_size_per_feature_per_rank``.
    """
    pooled: list[Tensor] = []
    first_bag = 0
    for table, bags in zip(feature_table_map, bags_per_feature, strict=True):
        bounds = offsets[first_bag : first_bag + bags + 1].long()
        first, last = int(bounds[0]), int(bounds[-1])
        first_bag += bags
        distinct, index = torch.unique(indices[first:last].long(), return_inverse=True)
        weights = None if per_sample_weights is None else per_sample_weights[first:last].float()
        pooled.append(pool_rows(rows_of_table(table, distinct), index, bounds - first, mode, weights))
    if mode == PoolingMode.NONE:
        return torch.cat(pooled)
    if bags_per_rank is None:
        return torch.cat(pooled, dim=1)
    return rank_after_rank(pooled, bags_per_rank)


def pool_rows(
    rows: Tensor,
    index: Tensor,
    offsets: Tensor,
    mode: PoolingMode,
    per_sample_weights: Tensor | None,
) -> Tensor:
    """Bags of rows pooled as a TBE does, float32 [B, D]; with PoolingMode.NONE the rows themselves, [N, D].

    Args:
        rows (Tensor): float32 [n, D].
        index (Tensor): int64 [N], the row of each lookup.
        offsets (Tensor): int64 [B + 1], from 0.
        mode (PoolingMode): of the TBE.
        per_sample_weights (Optional[Tensor]): float32 [N].
    """
    if mode == PoolingMode.NONE:
        return rows[index]
    weights = per_sample_weights
    if mode == PoolingMode.MEAN:
        # FBGEMM divides the weighted sum by the number of lookups.
        lengths = offsets.diff()
        scale = (1.0 / lengths.clamp(min=1)).repeat_interleave(lengths, output_size=len(index))
        weights = scale if weights is None else weights * scale
    return F.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
