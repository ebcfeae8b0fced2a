"""The bit-width of every row of one table."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_mpe.packing.order_segments import is_permutation, rows_from_segments

MAX_BITS = 8


@dataclass(frozen=True, eq=False)
class TableBitWidths:
    """One bit-width, 0 to 8, per segment of the frequency order of a table.

    Segment ``k`` holds the rows of place ``bounds[k] <= place < bounds[k + 1]``, all ``bits[k]`` wide::

        place     0  1  2  3  4  5  6  7  8  9
        bounds    0     2           6           10
        bits      [ 6 ] [    3    ] [    0    ]

    Attributes:
        num_embeddings (int): rows of the table.
        embedding_dim (int): elements of a row.
        bounds (tuple[int, ...]): k + 1 increasing places, from 0 to num_embeddings.
        bits (tuple[int, ...]): the k bit-widths.
        order (Optional[Tensor]): int32 [num_embeddings], the place of each row, a permutation; None when ids are it.

    Raises:
        ValueError: if bounds, bits and order do not fit each other.
    """

    num_embeddings: int
    embedding_dim: int
    bounds: tuple[int, ...]
    bits: tuple[int, ...]
    order: Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_embeddings < 1 or self.embedding_dim < 1:
            raise ValueError(f"a table of {self.num_embeddings} rows of {self.embedding_dim} elements is no table")
        if len(self.bounds) != len(self.bits) + 1 or self.bounds[0] != 0 or self.bounds[-1] != self.num_embeddings:
            raise ValueError(f"bounds must run from 0 to {self.num_embeddings} around {len(self.bits)} bit-widths")
        if any(low >= high for low, high in zip(self.bounds, self.bounds[1:], strict=False)):
            raise ValueError("bounds must increase")
        if any(not 0 <= b <= MAX_BITS for b in self.bits):
            raise ValueError(f"bit-widths must lie between 0 and {MAX_BITS}, got {sorted(set(self.bits))}")
        if self.order is not None:
            order = self.order
            if order.dtype != torch.int32 or order.shape != (self.num_embeddings,):
                raise ValueError(f"order must be int32 [{self.num_embeddings}]")
            if not is_permutation(order):
                raise ValueError(f"order must be a permutation of 0 to {self.num_embeddings - 1}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TableBitWidths):
            return NotImplemented
        mine = (self.num_embeddings, self.embedding_dim, self.bounds, self.bits)
        if mine != (other.num_embeddings, other.embedding_dim, other.bounds, other.bits):
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return torch.equal(self.order, other.order)

    __hash__ = None  # type: ignore[assignment]

    def of_rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The bit-width of the rows ``start`` to ``stop``, all by default, uint8 [stop - start], by row id."""
        return rows_from_segments(self.bounds, self.bits, self.order, torch.uint8, start, stop)

    def runs(self) -> list[tuple[int, int]]:
        """Segments with neighbours of equal width joined: (first place, bit-width) of each."""
        joined: list[tuple[int, int]] = []
        for first, bits in zip(self.bounds, self.bits, strict=False):
            if not joined or joined[-1][1] != bits:
                joined.append((first, bits))
        return joined

    def rows_per_width(self) -> list[int]:
        """Rows of each bit-width, 9 numbers."""
        rows = [0] * (MAX_BITS + 1)
        for low, high, bits in zip(self.bounds, self.bounds[1:], self.bits, strict=False):
            rows[bits] += high - low
        return rows

    @property
    def average_bits(self) -> float:
        """Mean bit-width of a row; says nothing about padding, directories and scales: see size_report for bytes."""
        return sum(b * n for b, n in enumerate(self.rows_per_width())) / self.num_embeddings


def check_candidate_bits(candidate_bits: Sequence[int]) -> tuple[int, ...]:
    """The candidate bit-widths as a sorted tuple.

    Raises:
        ValueError: if there is none, one occurs twice, or one is not an integer from 0 to 8.
    """
    bits = tuple(sorted(candidate_bits))
    valid = bits and len(set(bits)) == len(bits) and all(isinstance(b, int) and 0 <= b <= MAX_BITS for b in bits)
    if not valid:
        raise ValueError(f"candidate bit-widths must be distinct integers from 0 to {MAX_BITS}, got {candidate_bits}")
    return bits
