"""What a cached TBE has to know of a table."""

from dataclasses import dataclass

from torch import Tensor

from torchrec_mpe.cache.config import CacheConfig


@dataclass(frozen=True, eq=False)
class CachedTableSpec:
    """A table, or a shard of one.

    Attributes:
        name (str): of the table.
        rows (int): of the shard, below 2^31.
        dim (int): columns of the shard, a multiple of 4 as FBGEMM's training TBE has it.
        config (CacheConfig): store and cache.
        wide_rows (Optional[Tensor]): bool [rows], rows that are stored in 8 bits while the others are in 4; by default
            all rows have ``config.bits``.
        first_row (int): of the shard in its table.
        first_column (int): of the shard in its table.

    Raises:
        ValueError: naming the table, if it has no rows or too many, a number of columns that is no multiple of 4, or
            ``wide_rows`` is for another number of rows.
    """

    name: str
    rows: int
    dim: int
    config: CacheConfig
    wide_rows: Tensor | None = None
    first_row: int = 0
    first_column: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rows < 2**31:
            raise ValueError(f"table {self.name} has {self.rows} rows here: 1 to 2^31 - 1 are possible")
        if self.dim < 4 or self.dim % 4:
            raise ValueError(f"table {self.name} has {self.dim} columns here: FBGEMM's TBE takes multiples of 4")
        if self.wide_rows is not None and self.wide_rows.shape != (self.rows,):
            raise ValueError(f"table {self.name} has {self.rows} rows, wide_rows is {list(self.wide_rows.shape)}")
