"""A rank's part of a table, wherever its rows are."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torchrec.distributed.embedding_types import ShardedEmbeddingTable


def shard_offsets(table: ShardedEmbeddingTable) -> tuple[int, int]:
    """First row and first column of a table's local shard."""
    if table.local_metadata is None:
        return 0, 0
    row, column = table.local_metadata.shard_offsets
    return row, column


class RowShard(Protocol):
    """Neighbouring rows and columns of a table.

    Attributes:
        name (str): of the table.
        first_row, first_column (int): where it starts in the table.
        rows, columns (int): its size.
    """

    @property
    def name(self) -> str: ...
    @property
    def first_row(self) -> int: ...
    @property
    def first_column(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Values of some of its rows, counted from its first, [stop - start, columns]."""

    def read_rows(self, rows: Tensor) -> Tensor:
        """Values of some distinct rows, int64 [n], counted from its first, [n, columns]."""


@dataclass(frozen=True, eq=False)
class TensorShard:
    """A RowShard whose rows are one tensor, [rows, columns]."""

    name: str
    first_row: int
    first_column: int
    values: Tensor

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def columns(self) -> int:
        return self.values.shape[1]

    def read(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def read_rows(self, rows: Tensor) -> Tensor:
        return self.values[rows.to(self.values.device)]
