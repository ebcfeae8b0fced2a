"""How the rows of a transform-coded table are coded: groups of neighbouring places, each plain or transformed."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchrec_mpe.ops.reference.run_coding import COMPONENT_BLOCKS, MAX_COMPONENTS, TRANSFORMED, component_bits
from torchrec_mpe.packing.bit_widths import MAX_BITS
from torchrec_mpe.packing.order_segments import is_permutation


@dataclass(frozen=True)
class PlainRows:
    """Rows of one width for all D elements: ``element d = (code - 2**(bits - 1)) * step_size + mean[d]``.

    Attributes:
        bits (int): bit-width, 0 to 8; rows of 0 bits read the table's zero row.
        step_size (float): positive, a bfloat16; 0 for 0 bits.
    """

    bits: int
    step_size: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= MAX_BITS:
            raise ValueError(f"bit-widths must lie between 0 and {MAX_BITS}, got {self.bits}")
        if (self.step_size > 0) != (self.bits > 0):
            raise ValueError(f"plain rows of {self.bits} bits cannot have a step size of {self.step_size}")

    @property
    def levels(self) -> tuple[float, ...]:
        """What is stored of the group beside its record: the step size, if it has bits."""
        return (self.step_size,) if self.bits else ()

    def row_bits(self, embedding_dim: int) -> int:
        """Bits of a row: each block of 8 elements takes whole bytes."""
        return -(-embedding_dim // 8) * 8 * self.bits

    @property
    def record_coding(self) -> int:
        """The coding of the group's run record: the bit-width."""
        return self.bits


@dataclass(frozen=True)
class TransformedRows:
    """Rows of K components: ``element d = sum_k (scales[k] * code_k + offsets[k]) * basis[k, d] + mean[d]``.

    The codes of a row follow each other from component 0 on, each from its lowest bit, without padding. Components of
    0 bits are not stored and add nothing.

    Attributes:
        block_bits (tuple[int, ...]): bit-width, 0 to 8, of the components of each of ``COMPONENT_BLOCKS``, 5 numbers.
        scales (tuple[float, ...]): bfloat16, of each component of more than 0 bits, in order.
        offsets (tuple[float, ...]): bfloat16, likewise.
        components (int): K of the table; blocks end there.
    """

    block_bits: tuple[int, ...]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    components: int

    def __post_init__(self) -> None:
        if len(self.block_bits) != len(COMPONENT_BLOCKS) or not 1 <= self.components <= MAX_COMPONENTS:
            raise ValueError(
                f"transformed rows have {len(COMPONENT_BLOCKS)} block widths and 1 to {MAX_COMPONENTS} components, got "
                f"{self.block_bits} and {self.components}"
            )
        if any(not 0 <= bits <= MAX_BITS for bits in self.block_bits):
            raise ValueError(f"bit-widths must lie between 0 and {MAX_BITS}, got {self.block_bits}")
        coded = sum(bits > 0 for bits in self.component_bits)
        if len(self.scales) != coded or len(self.offsets) != coded:
            raise ValueError(f"{coded} coded components need as many scales and offsets")

    @property
    def component_bits(self) -> tuple[int, ...]:
        """The bit-width of each of the table's K components."""
        return component_bits(self.record_coding, self.components)

    @property
    def record_coding(self) -> int:
        """The coding of the group's run record: the blocks' widths, the first in the lowest bits."""
        return TRANSFORMED | sum(bits << 4 * block for block, bits in enumerate(self.block_bits))

    @property
    def levels(self) -> tuple[float, ...]:
        """What is stored of the group beside its record: scale and offset of each coded component in turn."""
        return tuple(value for pair in zip(self.scales, self.offsets, strict=True) for value in pair)

    def row_bits(self, embedding_dim: int) -> int:
        """Bits of a row."""
        return sum(self.component_bits)


RowCoding = PlainRows | TransformedRows


@dataclass(frozen=True, eq=False)
class TableCoding:
    """The coding of every row of a table, by segments of its frequency order.

    Segment ``g`` holds the rows of place ``bounds[g] <= place < bounds[g + 1]``, coded by ``groups[g]``.

    Attributes:
        num_embeddings (int): rows of the table.
        embedding_dim (int): D, elements of a row.
        bounds (tuple[int, ...]): increasing places, from 0 to num_embeddings.
        groups (tuple[RowCoding, ...]): one fewer.
        basis (Tensor): float16 [K + 1, D], K up to 16: what component k adds to a row, and last the mean.
        encoder (Tensor): float32 [D, K]: a row's components are ``(row - mean) @ encoder``.
        zero_row (Optional[Tensor]): float32 [D], what plain rows of 0 bits read; None: zeros.
        order (Optional[Tensor]): int32 [num_embeddings], the place of each row; None when ids are it.

    Raises:
        ValueError: if they do not fit each other.
    """

    num_embeddings: int
    embedding_dim: int
    bounds: tuple[int, ...]
    groups: tuple[RowCoding, ...]
    basis: Tensor
    encoder: Tensor
    zero_row: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        rows, dim = self.num_embeddings, self.embedding_dim
        if len(self.bounds) != len(self.groups) + 1 or self.bounds[0] != 0 or self.bounds[-1] != rows:
            raise ValueError(f"bounds must run from 0 to {rows} around {len(self.groups)} groups")
        if any(low >= high for low, high in zip(self.bounds, self.bounds[1:], strict=False)):
            raise ValueError("bounds must increase")
        shape = (self.components + 1, dim)
        if self.basis.dtype != torch.float16 or tuple(self.basis.shape) != shape or shape[0] > MAX_COMPONENTS + 1:
            raise ValueError(f"basis must be float16 [K + 1, {dim}], got {self.basis.dtype} {list(self.basis.shape)}")
        if self.encoder.dtype != torch.float32 or tuple(self.encoder.shape) != (dim, self.components):
            raise ValueError(f"encoder must be float32 [{dim}, {self.components}], got {list(self.encoder.shape)}")
        for group in self.groups:
            if isinstance(group, TransformedRows) and group.components != self.components:
                raise ValueError(f"a group of {group.components} components in a table of {self.components}")
        if self.zero_row is not None and (self.zero_row.dtype != torch.float32 or self.zero_row.shape != (dim,)):
            raise ValueError(f"zero_row must be float32 [{dim}]")
        if self.order is not None and (
            self.order.dtype != torch.int32 or self.order.shape != (rows,) or not is_permutation(self.order)
        ):
            raise ValueError(f"order must be int32 [{rows}], a permutation of 0 to {rows - 1}")

    @property
    def components(self) -> int:
        """K."""
        return len(self.basis) - 1

    @property
    def run_rows(self) -> tuple[int, ...]:
        """Rows of each group."""
        return tuple(stop - first for first, stop in pairwise(self.bounds))

    @property
    def mean(self) -> Tensor:
        """float32 [D], as it is stored."""
        return self.basis[-1].float()
