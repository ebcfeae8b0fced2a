"""A batch's ids by table: that bags lie within the ids, and what happens to ids outside their table."""

import itertools
import warnings
from collections.abc import Sequence

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor

from torchrec_mpe.cache.table_spec import CachedTableSpec

_FATAL = (BoundsCheckMode.FATAL, BoundsCheckMode.V2_FATAL, BoundsCheckMode.NONE)
_WARNING = (BoundsCheckMode.WARNING, BoundsCheckMode.V2_WARNING)


def ids_per_table(
    indices: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    feature_table_map: Sequence[int],
    tables: Sequence[CachedTableSpec],
) -> list[int]:
    """How many of a batch's ids are of each table. Waits for the device once.

    Raises:
        TypeError: naming the tables, if the ids are no integers.
        ValueError: naming the tables, if the offsets decrease or do not go from 0 to the number of ids, or are not as
            many as there are bags.
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"tables {_names(tables)}: ids must be int32 or int64, got {indices.dtype}")
    bags = sum(bags_per_feature)
    if len(offsets) != max(bags, 0) + 1:
        raise ValueError(f"tables {_names(tables)}: {bags} bags have {bags + 1} offsets, got {len(offsets)}")
    last_bags = torch.tensor([0, *itertools.accumulate(bags_per_feature)], device=offsets.device)
    least = offsets.diff().amin(0, keepdim=True) if len(offsets) > 1 else offsets.new_zeros(1)
    *bounds, shortest = torch.cat([offsets[last_bags], least]).tolist()
    if shortest < 0 or bounds[0] != 0 or bounds[-1] != len(indices):
        raise ValueError(
            f"tables {_names(tables)}: offsets must go from 0 to the {len(indices)} ids and not decrease, they go from "
            f"{bounds[0]} to {bounds[-1]}{' and decrease' if shortest < 0 else ''}"
        )
    per_table = [0] * len(tables)
    for table, (first, last) in zip(feature_table_map, itertools.pairwise(bounds), strict=True):
        per_table[table] += last - first
    return per_table


def within_tables(
    indices: Tensor, per_table: Sequence[int], tables: Sequence[CachedTableSpec], mode: BoundsCheckMode
) -> Tensor:
    """Ids that are rows of their tables: row 0 in place of others, in the modes WARNING and IGNORE.

    Raises:
        IndexError: naming the table, for an id outside it in the modes FATAL and NONE.
    """
    rows = torch.tensor([table.rows for table in tables], device=indices.device)
    limits = rows.repeat_interleave(torch.tensor(per_table, device=indices.device), output_size=len(indices))
    outside = (indices < 0) | (indices >= limits)
    if mode in _FATAL:
        if bool(outside.any()):
            at = int(outside.nonzero()[0])
            lasts = itertools.accumulate(per_table)
            table = next(table for table, last in zip(tables, lasts, strict=True) if at < last)
            raise IndexError(f"table {table.name} has {table.rows} rows here, got the id {int(indices[at])}")
        return indices
    # On a GPU counting would wait for it.
    if mode in _WARNING and not indices.is_cuda and bool(outside.any()):
        warnings.warn(
            f"{int(outside.sum())} ids are outside tables {_names(tables)} and are looked up as row 0", stacklevel=2
        )
    return torch.where(outside, 0, indices)


def _names(tables: Sequence[CachedTableSpec]) -> str:
    return ", ".join(table.name for table in tables)
