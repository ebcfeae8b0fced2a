"""Coded tables as an allocation of bytes makes them, with random codes."""

import itertools

import torch

from torchrec_mpe.ops.reference.run_coding import COMPONENT_BLOCKS
from torchrec_mpe.packing.layout import END_PADDING
from torchrec_mpe.packing.pack import pack_tables
from torchrec_mpe.packing.pack_coded import CodedTableToPack
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.table_coding import PlainRows, RowCoding, TableCoding, TransformedRows

HUNDREDFOLD = "coded 100x"
EIGHTFOLD = "coded 8x"

Widths = tuple[int, int, int, int, int]

# Of blocks of components, the most frequent group first.
D16_WIDTHS: tuple[Widths, ...] = (
    *((4, 4, 4, 4, 4),) * 4,
    *((4, 4, 4, 4, 3),) * 3,
    *((4, 4, 4, 3, 3),) * 3,
    (4, 4, 3, 3, 3),
    (4, 4, 4, 3, 2),
    (4, 4, 4, 3, 1),
    (4, 4, 3, 2, 1),
    (4, 4, 4, 2, 0),
    (4, 4, 1, 2, 0),
    (4, 2, 2, 1, 0),
    (3, 2, 2, 0, 0),
    (3, 1, 1, 0, 0),
    (3, 1, 0, 0, 0),
    (2, 1, 0, 0, 0),
    (2, 0, 0, 0, 0),
    (1, 0, 0, 0, 0),
)
TAIL_WIDTHS: tuple[Widths, ...] = (
    (4, 3, 2, 1, 0),
    (4, 2, 2, 0, 0),
    (3, 3, 1, 0, 0),
    (3, 2, 1, 0, 0),
    (3, 2, 0, 0, 0),
    (3, 1, 0, 0, 0),
    (2, 1, 0, 0, 0),
)
HEAD_BITS = (5,) * 6 + (4,) * 6
HEAD_SHARE = 0.05
"""Share of the rows of more than 16 elements that are plain."""


def groups_of(rows: int, dim: int, kind: str) -> tuple[tuple[int, ...], tuple[RowCoding, ...]]:
    """Bounds and codings of the groups of a table, which grow by the square root of 2."""

    def bounds(first: int, stop: int, count: int) -> list[int]:
        sizes = [2 ** (k / 2) for k in range(count)]
        return [first + round((stop - first) * total / sum(sizes)) for total in itertools.accumulate(sizes)]

    def transformed(widths: Widths, components: int) -> TransformedRows:
        blocks = zip(widths, COMPONENT_BLOCKS, strict=True)
        coded = sum(min(high, components) - low for bits, (low, high) in blocks if bits and low < components)
        return TransformedRows(widths, (0.125,) * coded, (-0.5,) * coded, components)

    groups: list[RowCoding]
    if dim == 16:
        widths = D16_WIDTHS if kind == HUNDREDFOLD else ((4, 4, 4, 4, 4),) * 10
        groups = [transformed(of_blocks, 16) for of_blocks in widths]
        return (0, *bounds(0, rows, len(groups))), tuple(groups)
    if kind == EIGHTFOLD:
        groups = [PlainRows(4, 0.125 * 2 ** (k % 3)) for k in range(10)]
        return (0, *bounds(0, rows, len(groups))), tuple(groups)
    head = round(rows * HEAD_SHARE)
    groups = [PlainRows(bits, 0.125) for bits in HEAD_BITS] + [transformed(widths, 8) for widths in TAIL_WIDTHS]
    return (0, *bounds(0, head, len(HEAD_BITS)), *bounds(head, rows, len(TAIL_WIDTHS))), tuple(groups)


def coded_table(rows: int, dim: int, kind: str) -> PackedTables:
    """One ranked table: K = 16 and only transformed rows at D = 16, else K = 8 and a plain head, or only plain rows.

    Args:
        rows (int): of the table.
        dim (int): D.
        kind (str): "coded 100x", 5 bits a row at D = 16; or "coded 8x", 4 bits an element.
    """
    generator = torch.Generator().manual_seed(0)
    bounds, groups = groups_of(rows, dim, kind)
    # The first groups of a small table would have no rows.
    filled = [k for k in range(len(groups)) if bounds[k] < bounds[k + 1]]
    bounds, groups = (*(bounds[k] for k in filled), rows), tuple(groups[k] for k in filled)
    components = 16 if dim == 16 else 8
    basis = torch.randn(components + 1, dim, generator=generator).half()
    encoder = torch.zeros(dim, components)
    coding = TableCoding(rows, dim, bounds, groups, basis, encoder, torch.zeros(dim))
    packed = pack_tables([CodedTableToPack("t", coding, lambda: ())])
    packed.weights[:-END_PADDING] = torch.randint(
        256, (packed.weights.numel() - END_PADDING,), generator=generator, dtype=torch.uint8
    )
    return packed
