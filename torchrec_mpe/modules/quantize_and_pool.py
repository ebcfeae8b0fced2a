"""From looked-up rows to pooled embeddings: quantize each row, weight it, sum it into its bag."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_mpe.quantizer import RowQuantizer


@dataclass(frozen=True)
class FeatureLookup:
    """What one feature's lookup in one table (or shard of it) needs.

    Attributes:
        table (str): the table's name.
        mean (bool): divide each bag by its number of ids.
        num_rows (int): rows of the table or shard; FBGEMM reads row 0 for an id outside, and so does the quantizer.
        first_row (int): the shard's first row in the table.
    """

    table: str
    mean: bool
    num_rows: int
    first_row: int = 0


def quantize_and_pool(
    quantizer: RowQuantizer,
    features: Sequence[FeatureLookup],
    rows: Tensor,
    ids: Tensor,
    lengths: Tensor,
    ids_per_feature: Sequence[int],
    bags_per_feature: Sequence[int],
    per_sample_weights: Tensor | None = None,
    columns: slice = slice(None),
    gradient_factor: float = 1,
) -> Tensor:
    """Quantize the rows of F features and pool them into each feature's bags.

    Args:
        quantizer (RowQuantizer): of the tables' embedding dimension.
        features (Sequence[FeatureLookup]): F features.
        rows (Tensor): [N, D], the rows of all features' ids, feature after feature.
        ids (Tensor): [N], int32 or int64, row ids counted from each feature's ``first_row``.
        lengths (Tensor): [bags], ids per bag, feature after feature.
        ids_per_feature (Sequence[int]): F numbers, their sum is N.
        bags_per_feature (Sequence[int]): F numbers, their sum is the number of bags.
        per_sample_weights (Optional[Tensor]): [N].
        columns (slice): the columns of the tables that ``rows`` holds.
        gradient_factor (float): multiplies the gradients of the quantizer's parameters.

    Returns:
        Tensor: [bags, D].
    """
    device = rows.device
    first_rows = [quantizer.first_row[f.table] + f.first_row for f in features]
    tables = [quantizer.table_number[f.table] for f in features]
    limits = [f.num_rows for f in features]
    per_feature = torch.tensor([list(ids_per_feature), first_rows, tables, limits], device=device)
    shift, table, limit = torch.repeat_interleave(per_feature[1:], per_feature[0], dim=1, output_size=len(rows))
    row = torch.where((ids >= 0) & (ids < limit), ids, 0) + shift
    quantized: Tensor = quantizer(rows, row, table, columns, gradient_factor)
    if per_sample_weights is not None:
        quantized = quantized * per_sample_weights.to(quantized.dtype).unsqueeze(1)
    bag = torch.repeat_interleave(lengths, output_size=len(rows))
    pooled = quantized.new_zeros(len(lengths), rows.shape[1]).index_add(0, bag, quantized)
    if any(f.mean for f in features):
        repeats = torch.tensor(list(bags_per_feature), device=device)
        mean = torch.tensor([f.mean for f in features], device=device).repeat_interleave(repeats)
        divisor = torch.where(mean, lengths.clamp(min=1), 1)
        pooled = pooled / divisor.to(pooled.dtype).unsqueeze(1)
    return pooled
