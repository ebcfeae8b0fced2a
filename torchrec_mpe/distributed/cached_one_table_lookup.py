"""Unpooled rows of a cached TBE on CPU, at the speed of pooled ones."""

from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.distributed.one_table_lookup import OneTableLookup, can_be_one_table
from torchrec_mpe.ops.quantized_embedding_bag import unique_ids


class CachedOneTableLookup:
    """A :class:`OneTableLookup` of the slots that a batch's rows are in.

    Args:
        tbe (CachedTableBatchedEmbeddingBags): with a TBE of slots for which :func:`can_be_one_table`.
    """

    def __init__(self, tbe: CachedTableBatchedEmbeddingBags) -> None:
        self._tbe = tbe

    def __call__(self, ids: Tensor, offsets: Tensor, bags_per_feature: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows of the distinct ids of a batch; arguments and result as of OneTableLookup.

        Without gradients or in eval mode neither rows nor cache change.
        """
        tbe = self._tbe
        bags = [bags_per_feature] * len(tbe.feature_table_map)
        if not (tbe.training and torch.is_grad_enabled()):
            num_rows = [tbe.tables[t].rows for t in tbe.feature_table_map]
            distinct, index, row_offsets = unique_ids(ids, offsets, bags, num_rows)
            return tbe(distinct, row_offsets), distinct, index, row_offsets
        slots, batch = tbe.slots(ids, offsets, bags)
        with tbe.ended_by_an_error(batch):
            # Made anew: the spill area may have grown.
            rows, distinct, index, row_offsets = OneTableLookup(tbe.slot_tbe)(slots, offsets, bags_per_feature)
            rows = tbe.until_backward(rows, batch)
            ids_of_rows = torch.empty_like(distinct, dtype=ids.dtype)
            ids_of_rows[index.long()] = ids
            return rows, ids_of_rows, index, row_offsets


def one_table_lookup(tbe: Any) -> OneTableLookup | CachedOneTableLookup | None:
    """How to look up a TBE as one table; None if its tables do not lie in memory like one."""
    if isinstance(tbe, CachedTableBatchedEmbeddingBags):
        return CachedOneTableLookup(tbe) if can_be_one_table(tbe.slot_tbe) else None
    return OneTableLookup(tbe) if can_be_one_table(tbe) else None
