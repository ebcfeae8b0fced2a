"""The bags of a batch, and the arguments and gradients of the op that quantizes and pools their rows."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

SUM, MEAN = 0, 1
"""FBGEMM's PoolingMode values."""


class Bags(NamedTuple):
    """The bags of F features and what their ids mean.

    An id of feature f that is not in ``[0, num_rows[f])`` counts as 0, which is the row that FBGEMM reads for it.

    Attributes:
        ids (Tensor): int32 or int64 [N], feature after feature, bag after bag; with ``index``, the U distinct ids of
            each feature.
        offsets (Tensor): int32 or int64 [bags + 1], where each bag starts, counted from ``offsets[0]``.
        bags_per_feature (Sequence[int]): F numbers, their sum is the number of bags.
        first_row (Sequence[int]): F numbers, where the rows of the feature's table (or shard of it) start among those
            of all tables.
        num_rows (Sequence[int]): F numbers, rows of the feature's table or shard.
        table (Sequence[int]): F numbers, the line of the zero rows of the feature's table.
        pooling_mode (Sequence[int]): F times :data:`SUM` or :data:`MEAN`; MEAN divides by the number of ids of the
            bag, weighted or not.
        per_sample_weights (Optional[Tensor]): floating point [N].
        index (Optional[Tensor]): integer [N], where each id is among the distinct ones, counted from
            ``row_offsets[0]``.
        row_offsets (Optional[Tensor]): integer [F + 1], where each feature's distinct ids start; with ``index``.
        side_by_side (bool): pool the features beside each other, as in a KeyedTensor; every feature must have the same
            number of bags.
    """

    ids: Tensor
    offsets: Tensor
    bags_per_feature: Sequence[int]
    first_row: Sequence[int]
    num_rows: Sequence[int]
    table: Sequence[int]
    pooling_mode: Sequence[int]
    per_sample_weights: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index
    row_offsets: Tensor | None = None
    side_by_side: bool = False


class Arguments(NamedTuple):
    """Of :func:`torchrec_mpe.ops.quantized_embedding_bag.quantized_embedding_bag`, which says what they are."""

    rows: Tensor
    bags: Bags
    row_map: Tensor
    probabilities: Tensor | None
    alpha: Tensor
    beta: Tensor
    zero_rows: Tensor | None
    candidate_bits: Sequence[int]
    gradient_scale: Tensor
    gradient_factor: float

    @classmethod
    def of(cls, *arguments: Any) -> "Arguments":
        """From arguments in the order of the op's schema, :data:`ARGUMENT_NAMES`."""
        named = dict(zip(ARGUMENT_NAMES, arguments, strict=True))
        return cls(bags=Bags(*(named.pop(name) for name in Bags._fields)), **named)


ARGUMENT_NAMES: tuple[str, ...] = tuple(
    chain.from_iterable(Bags._fields if name == "bags" else (name,) for name in Arguments._fields)
)
"""The arguments in the order of the op's schema, where the fields of the bags stand in the place of the bags."""


class Gradients(NamedTuple):
    """Of the arguments of the same names; None or, from a compiled op, empty for what there is not."""

    rows: Tensor
    probabilities: Tensor | None
    alpha: Tensor
    beta: Tensor
    zero_rows: Tensor | None
    per_sample_weights: Tensor | None = None
