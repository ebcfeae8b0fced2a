"""Where the rows of a table to code come from: the part of it that this rank owns."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_PIECE_ELEMENTS = 1 << 20


class OwnedRows(Protocol):
    """The rows of a table that this rank owns; each row of the table is owned by exactly one rank."""

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """All of them, a few MiB at a time: the id of the first, and float32 [n, D] of ids that follow each other."""

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of some ids, int64 [n], of the whole table: float32 [n, D]; zeros for those of other ranks."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, each of which calls it; ``values`` itself in one process."""


@dataclass(frozen=True, eq=False)
class WholeTable:
    """All rows of a table in the memory of one process.

    Attributes:
        weight (Tensor): float32 [num_embeddings, D].
    """

    weight: Tensor

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        step = max(1, _PIECE_ELEMENTS // self.weight.shape[1])
        for first in range(0, len(self.weight), step):
            yield first, self.weight[first : first + step]

    def rows(self, ids: Tensor) -> Tensor:
        return self.weight[ids]

    def sum(self, values: Tensor) -> Tensor:
        return values


@dataclass(frozen=True, eq=False)
class TableToCode:
    """A trained table.

    Attributes:
        name (str): table.
        num_embeddings (int): rows.
        embedding_dim (int): D, elements of a row.
        counts (Tensor): [num_embeddings], lookups of each row in training; rows of 0 are unseen.
        curvature (Tensor): float64 [D, D], symmetric, of the loss in the pooled embedding.
        rows (OwnedRows): float32 rows.
        weights (Optional[Tensor]): [num_embeddings], the sum of the squared lookup weights of each row, where bags are
            weighted or means; None: ``counts``.
        zero_row (Optional[Tensor]): float32 [D], what unseen rows read; None: the weighted mean of the others.

    Raises:
        ValueError: naming the table, if shapes do not fit, or counts, weights or curvature are not finite or negative.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    counts: Tensor
    curvature: Tensor
    rows: OwnedRows
    weights: Tensor | None = None
    zero_row: Tensor | None = None

    def __post_init__(self) -> None:
        rows, dim = self.num_embeddings, self.embedding_dim
        if rows < 1 or dim < 1:
            raise ValueError(f"table {self.name}: {rows} rows of {dim} elements are no table")
        if tuple(self.curvature.shape) != (dim, dim) or self.curvature.dtype != torch.float64:
            raise ValueError(
                f"table {self.name}: its curvature must be float64 [{dim}, {dim}], got {self.curvature.dtype} "
                f"{list(self.curvature.shape)}"
            )
        for what, values in (("counts", self.counts), ("weights", self.weights)):
            if values is None:
                continue
            if tuple(values.shape) != (rows,):
                raise ValueError(f"table {self.name} has {rows} rows, its {what} {list(values.shape)}")
            if not (bool((values >= 0).all()) and bool(values.max() < torch.inf)):
                raise ValueError(f"table {self.name}: its {what} must be finite and not negative")
        if self.zero_row is not None and tuple(self.zero_row.shape) != (dim,):
            raise ValueError(
                f"table {self.name}: its zero row must be float32 [{dim}], got {list(self.zero_row.shape)}"
            )

    def row_weights(self, ids: slice | Tensor) -> Tensor:
        """What the error of each of some rows counts, float64 [n]: its lookups, but half a lookup.

        A row seen once in training is looked up again less often than once for as long: its own example chose it.
        """
        counts = self.counts[ids].double()
        weights = (counts - 0.5).clamp_(min=0)
        if self.weights is not None:
            weights *= self.weights[ids].double() / counts.clamp(min=1e-300)
        return weights
