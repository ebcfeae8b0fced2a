"""Coded tables whose rows are made from random codes, so that they owe nothing to encoding or packing."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from torchrec_mpe.ops.reference.run_coding import COMPONENT_BLOCKS
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.packing.pack_coded import CodedTableToPack
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.table_coding import PlainRows, RowCoding, TableCoding, TransformedRows


def random_coding(
    seed: int, rows: int, dim: int, components: int, *, remap: bool = False, widths: Sequence[int] = range(9)
) -> tuple[TableCoding, Tensor]:
    """A coding of 1 to 12 groups, plain and transformed, and the rows that it can store exactly.

    Args:
        seed (int): of everything.
        rows (int): of the table.
        dim (int): D.
        components (int): K, at most D.
        remap (bool): ids are in an order of their own.
        widths (Sequence[int]): bit-widths to draw from.

    Returns:
        tuple[TableCoding, Tensor]: and float64 [rows, D], what the rows of the table decode to, by id.
    """
    generator = np.random.default_rng(seed)
    cuts = generator.integers(1, rows, min(11, rows - 1)) if rows > 1 else []
    bounds = (0, *sorted({int(cut) for cut in cuts}), rows)
    # An orthogonal transform of dyadic numbers: signed unit vectors where float16 is to lose nothing.
    axes, signs = generator.permutation(dim)[:components], generator.choice([-1.0, 1.0], components)
    basis = torch.zeros(components + 1, dim, dtype=torch.float64)
    basis[range(components), torch.from_numpy(axes)] = torch.from_numpy(signs)
    mean = torch.from_numpy(generator.integers(-8, 9, dim) / 16)
    basis[components] = mean
    encoder = basis[:components].T.float()
    zero_row = torch.from_numpy(generator.standard_normal(dim).astype(np.float32)) if generator.integers(3) else None
    groups: list[RowCoding] = []
    values = torch.zeros(rows, dim, dtype=torch.float64)
    for first, stop in pairwise(bounds):
        count = stop - first
        if components == 0 or generator.integers(3) == 0:
            bits = int(generator.choice(widths))
            step = 2.0 ** int(generator.integers(-6, -2)) if bits else 0.0
            groups.append(PlainRows(bits, step))
            if bits:
                codes = torch.from_numpy(generator.integers(0, 1 << bits, (count, dim))).double()
                values[first:stop] = (codes - (1 << (bits - 1))) * step + mean
            elif zero_row is not None:
                values[first:stop] = zero_row.double()
            continue
        block_bits = tuple(int(generator.choice(widths)) if low < components else 0 for low, _ in COMPONENT_BLOCKS)
        of_component = [
            b for b, (low, high) in zip(block_bits, COMPONENT_BLOCKS, strict=True) for _ in range(low, high)
        ]
        coded = [k for k in range(components) if of_component[k]]
        scales = tuple(2.0 ** int(generator.integers(-7, -2)) for _ in coded)
        offsets = tuple(int(generator.integers(-16, 17)) / 32 for _ in coded)
        groups.append(TransformedRows(block_bits, scales, offsets, components))
        values[first:stop] = mean
        for k, scale, offset in zip(coded, scales, offsets, strict=True):
            codes = torch.from_numpy(generator.integers(0, 1 << of_component[k], count)).double()
            values[first:stop] += (codes * scale + offset).unsqueeze(1) * basis[k]
    order = torch.from_numpy(generator.permutation(rows).astype(np.int32)) if remap else None
    coding = TableCoding(rows, dim, bounds, tuple(groups), basis.half(), encoder, zero_row, order)
    return coding, values if order is None else values[order.long()]


def coded_table(
    name: str, coding: TableCoding, values: Tensor, piece: int = 1 << 20, directory: str = "auto"
) -> CodedTableToPack:
    """The table of these rows, read in pieces."""

    def pieces() -> Iterator[tuple[int, Tensor]]:
        return ((k, values[k : k + piece].float()) for k in range(0, len(values), piece))

    return CodedTableToPack(name, coding, pieces, directory=directory)


def coded_collection(
    seed: int,
    dims: Sequence[int],
    components: Sequence[int | None],
    *,
    rows: int = 200,
    remap: bool = False,
    directory: str = "auto",
) -> tuple[PackedTables, list[Tensor]]:
    """One table for each pair of ``dims`` and ``components``, on the CPU.

    Args:
        seed (int): of everything.
        dims (Sequence[int]): D of each table.
        components (Sequence[Optional[int]]): K of each, at most D; None: it is not coded, of random widths.
        rows (int): of each table.
        remap (bool): ids of coded tables are in an order of their own.
        directory (str): of coded tables.

    Returns:
        tuple[PackedTables, list[Tensor]]: tables "t0", "t1", ... and float64 [rows, D] what each decodes to.
    """
    tables: list[TableToPack | CodedTableToPack] = []
    dense: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    for t, (dim, count) in enumerate(zip(dims, components, strict=True)):
        if count is not None:
            coding, values = random_coding(seed + t, rows, dim, min(count, dim), remap=remap)
            tables.append(coded_table(f"t{t}", coding, values, directory=directory))
            dense.append(values)
            continue
        bits = torch.randint(1, 9, (2,), generator=generator).tolist()
        bounds = (0, rows // 2, rows) if rows > 1 else (0, rows)
        widths = TableBitWidths(rows, dim, bounds, tuple(bits[: len(bounds) - 1]))
        alpha = torch.tensor([0.0, *(2.0**-k for k in range(8))])
        integers = torch.cat(
            [
                torch.randint(-(1 << b - 1), 1 << b - 1, (stop - start, dim), generator=generator) * float(alpha[b])
                for start, stop, b in zip(bounds, bounds[1:], bits, strict=False)
            ]
        )
        tables.append(
            TableToPack(f"t{t}", widths, lambda start, stop, x=integers: x[start:stop], alpha, torch.zeros(dim))
        )
        dense.append(integers.double())
    return pack_tables(tables), dense
