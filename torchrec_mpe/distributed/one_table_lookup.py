"""Unpooled rows of a training TBE on CPU, at the speed of pooled ones."""

import copy
from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.ops.quantized_embedding_bag import row_numbers, unique_ids
from torchrec_mpe.upstream.fused_optimizers import traits_of
from torchrec_mpe.upstream.modules import replace_buffers
from torchrec_mpe.upstream.tbe import (
    BoundsCheckMode,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
    buffers_as_one_table,
    clips_lookups,
    decays_rows,
    lies_like_one_table,
)

_MAX_ROWS = 2**31 - 2  # FBGEMM sorts row numbers as int32


def can_be_one_table(tbe: Any) -> bool:
    """Whether a module is a training TBE on CPU, its tables in memory like one, that is trained alike pooled or not.

    Row-wise Adagrad's weight decay is in FBGEMM's unpooled kernel alone, and clipping is of every lookup: with either,
    rows are looked up by that kernel, which is slower.
    """
    if type(tbe) is not SplitTableBatchedEmbeddingBagsCodegen or not tbe.use_cpu or len(set(tbe.dims)) != 1:
        return False
    traits = traits_of(tbe.optimizer)
    if decays_rows(tbe) or clips_lookups(tbe):
        return False
    if not traits.one_table or sum(spec[0] for spec in tbe.embedding_specs) > _MAX_ROWS:
        return False
    return lies_like_one_table(tbe, traits.state_elements(tbe.dims[0]))


class OneTableLookup:
    """Looks up the distinct rows of a batch in a TBE on CPU as if its tables were one, every row a bag of its own.

    FBGEMM's CPU backward of PoolingMode.NONE sums gradients in hash maps and takes 20 to 60 times as long as the pooled
    one. Pooling over bags of one row is the same, but pooled output is as wide as all features together, so that the
    features would have to have equally many ids: hence one table. Weights, optimizer state, learning rate and counters
    are the TBE's own, read anew at each call.

    Args:
        tbe (SplitTableBatchedEmbeddingBagsCodegen): for which :func:`can_be_one_table`.
    """

    def __init__(self, tbe: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        self._tbe = tbe
        rows = [spec[0] for spec in tbe.embedding_specs]
        self._num_rows = [rows[t] for t in tbe.feature_table_map]
        self._first_row = [sum(rows[:t]) for t in tbe.feature_table_map]

    def __call__(self, ids: Tensor, offsets: Tensor, bags_per_feature: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows of the distinct ids of a batch.

        Args:
            ids (Tensor): int32 or int64 [N], feature after feature.
            offsets (Tensor): int32 or int64 [F * B + 1].
            bags_per_feature (int): B.

        Returns:
            Tuple[Tensor, Tensor, Tensor, Tensor]: rows [U, D], whose backward updates the TBE's; and distinct ids [U],
            index [N] and row offsets [F + 1] of :func:`torchrec_mpe.ops.quantized_embedding_bag.unique_ids`.
        """
        tbe = self._tbe
        # For the bounds check of the mode that the TBE is in.
        ids, offsets, _, _ = tbe.prepare_inputs(ids, offsets)
        features = len(self._first_row)
        distinct, index, row_offsets = unique_ids(ids, offsets, [bags_per_feature] * features, self._num_rows)
        numbers = row_numbers(distinct, row_offsets, [1] * features, self._first_row, self._num_rows)
        one = self._as_one_table()
        rows: Tensor = one(numbers, torch.arange(len(numbers) + 1, dtype=numbers.dtype, device=numbers.device))
        tbe.step = one.step
        return rows, distinct, index, row_offsets

    def _as_one_table(self) -> SplitTableBatchedEmbeddingBagsCodegen:
        """A shallow copy that shares every tensor but those which say where tables and features begin."""
        tbe = self._tbe
        one = copy.copy(tbe)
        total, dim = sum(spec[0] for spec in tbe.embedding_specs), tbe.dims[0]
        buffers = buffers_as_one_table(tbe, has_state=bool(traits_of(tbe.optimizer).state_elements(dim)))
        replace_buffers(one, buffers)
        one.embedding_specs = [(total, *tbe.embedding_specs[0][1:])]
        one.feature_table_map = [0]
        one.total_D = one.max_D = dim
        one.pooling_mode = PoolingMode.SUM
        one.is_nobag = False
        one.bounds_check_mode_int = BoundsCheckMode.NONE.value
        return one
