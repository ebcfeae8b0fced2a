"""From looked-up rows to pooled embeddings: quantize each row, weight it, sum it into its bag."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torchrec_mpe.modules.row_quantizer import Bags, RowQuantizer


@dataclass(frozen=True)
class FeatureLookup:
    """What one feature's lookup in one table (or shard of it) needs.

    Attributes:
        table (str): the table's name.
        mean (bool): divide each bag by its number of ids.
        num_rows (int): rows of the table or shard; FBGEMM reads row 0 for an id outside, and so does the quantizer.
        first_row (int): where the table's or shard's rows start in the row map.
    """

    table: str
    mean: bool
    num_rows: int
    first_row: int


def quantize_and_pool(
    quantizer: RowQuantizer,
    features: Sequence[FeatureLookup],
    row_map: Tensor,
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor,
    bags_per_feature: Sequence[int],
    per_sample_weights: Tensor | None = None,
    columns: slice = slice(None),
    gradient_factor: float = 1,
    side_by_side: bool = False,
    index: Tensor | None = None,
    row_offsets: Tensor | None = None,
) -> Tensor:
    """Quantize the rows of F features and pool them into each feature's bags.

    Args:
        quantizer (RowQuantizer): of the tables' embedding dimension.
        features (Sequence[FeatureLookup]): F features.
        row_map (Tensor): integer [rows of all tables or shards], what each row belongs to: see
            :meth:`torchrec_mpe.modules.row_quantizer.RowQuantizer.row_map`.
        rows (Tensor): [N, D], the rows of all features' ids, feature after feature.
        ids (Tensor): [N], int32 or int64, row ids of each feature's table or shard.
        offsets (Tensor): [bags + 1], int32 or int64, where each bag starts, feature after feature, counted from
            ``offsets[0]``.
        bags_per_feature (Sequence[int]): F numbers, their sum is the number of bags.
        per_sample_weights (Optional[Tensor]): [N].
        columns (slice): the columns of the tables that ``rows`` holds.
        gradient_factor (float): multiplies the gradients of the quantizer's parameters.
        side_by_side (bool): features beside each other; every feature must have the same number B of bags.
        index (Optional[Tensor]): [N], where each id is among the distinct ids of its feature; then ``rows`` and ``ids``
            are those of the distinct ids, as :func:`torchrec_mpe.ops.quantized_embedding_bag.unique_ids` returns them.
        row_offsets (Optional[Tensor]): [F + 1], where each feature's distinct ids start; with ``index``.

    Returns:
        Tensor: [bags, D], or [B, F * D] if ``side_by_side``.
    """
    bags = Bags(
        row_map,
        ids,
        offsets,
        bags_per_feature,
        first_row=[f.first_row for f in features],
        num_rows=[f.num_rows for f in features],
        table=[quantizer.table_number[f.table] for f in features],
        pooling_mode=[int(f.mean) for f in features],  # FBGEMM's SUM is 0, MEAN 1
        per_sample_weights=per_sample_weights,
        side_by_side=side_by_side,
        index=index,
        row_offsets=row_offsets,
    )
    pooled: Tensor = quantizer(rows, bags, columns, gradient_factor)
    return pooled
