"""Random packed tables, and what they decode to by an independent computation."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.packing.packed_tables import PackedTables

ALPHA = torch.tensor([0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625])

_CHOICE = {
    Directory.RANKED: "ranked",
    Directory.REMAP: "remap",
    Directory.NIBBLE: "nibble",
    Directory.BITMAP: "bitmap",
    Directory.BITMAP_NIBBLE: "bitmap",
}

KINDS = tuple(_CHOICE)
"""Directories of tables that are not coded."""


def random_tables(
    seed: int,
    dims: Sequence[int],
    kinds: Sequence[Directory],
    *,
    max_rows: int = 1000,
    widths: Sequence[int] = range(9),
) -> tuple[PackedTables, list[Tensor]]:
    """One table for each pair of ``dims`` and ``kinds``, on the CPU, with widths drawn from ``widths``.

    Rows are made from random codes, so the dense tables owe nothing to quantizing, packing or directories. Tables of
    one dimension share their scales in about half of the seeds; about half of the tables have a vector for 0-bit rows.

    Args:
        seed (int): of everything.
        dims (Sequence[int]): embedding dimension of each table.
        kinds (Sequence[Directory]): directory kind of each table.
        max_rows (int): tables have 1 to this many rows, at least 4 for BITMAP_NIBBLE.
        widths (Sequence[int]): bit-widths; BITMAP takes one of them and 0, BITMAP_NIBBLE at least two of them and 0.

    Returns:
        tuple[PackedTables, list[Tensor]]: tables "t0", "t1", ... and float64 [rows, D] what each decodes to.
    """
    generator = np.random.default_rng(seed)
    shared = bool(generator.integers(2))
    scales: dict[int, tuple[Tensor, Tensor]] = {}
    tables: list[TableToPack] = []
    dense: list[Tensor] = []
    for t, (dim, kind) in enumerate(zip(dims, kinds, strict=True)):
        rows = int(generator.integers(4 if kind == Directory.BITMAP_NIBBLE else 1, max_rows + 1))
        bounds, bits = _segments(generator, rows, kind, widths)
        ranks = None
        if kind == Directory.REMAP or (kind != Directory.RANKED and generator.integers(4)):
            ranks = generator.permutation(rows).astype(np.int32)
        of_row = [_width_of_rank(row if ranks is None else int(ranks[row]), bounds, bits) for row in range(rows)]
        if not shared or dim not in scales:
            alpha = ALPHA * 2.0 ** int(generator.integers(-2, 3))
            beta = torch.from_numpy(generator.integers(-64, 65, dim).astype(np.float32)) / 256
            scales[dim] = (alpha, beta)
        alpha, beta = scales[dim]
        zero_row = (
            torch.from_numpy(generator.standard_normal(dim).astype(np.float32)) if generator.integers(2) else None
        )
        values = torch.zeros(rows, dim, dtype=torch.float64)
        for row, width in enumerate(of_row):
            if width:
                codes = torch.from_numpy(generator.integers(-(2 ** (width - 1)), 2 ** (width - 1), dim))
                values[row] = codes * alpha[width].double() + beta.double()
            elif zero_row is not None:
                values[row] = zero_row.double()
        # Few bits each: every value is exact in float32, and quantizing gives the code back.
        source = values.float()
        table_widths = TableBitWidths(
            rows, dim, tuple(bounds), tuple(bits), None if ranks is None else torch.from_numpy(ranks)
        )
        tables.append(
            TableToPack(
                f"t{t}",
                table_widths,
                lambda start, stop, source=source: source[start:stop],  # type: ignore[misc]
                alpha,
                beta,
                zero_row,
                _CHOICE[kind],
            )
        )
        dense.append(values)
    packed = pack_tables(tables)
    assert packed.directory_kinds.tolist() == list(kinds)
    return packed, dense


def _segments(
    generator: np.random.Generator, rows: int, kind: Directory, widths: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Bounds and bit-widths of at most 12 segments."""
    nonzero = [width for width in widths if width]
    if kind == Directory.BITMAP:
        chosen = int(generator.choice(nonzero))
        allowed, needed = [0, chosen], [chosen]
    elif kind == Directory.BITMAP_NIBBLE:
        allowed, needed = [0, *nonzero], [0, *generator.choice(nonzero, 2, replace=False).tolist()]
    else:
        allowed, needed = list(widths), []
    segments = int(generator.integers(max(1, len(needed)), min(rows, 12) + 1))
    cuts = generator.choice(np.arange(1, rows), segments - 1, replace=False) if segments > 1 else []
    bits = [*needed, *generator.choice(allowed, segments - len(needed)).tolist()]
    return [0, *sorted(int(cut) for cut in cuts), rows], [int(bit) for bit in generator.permutation(bits)]


def _width_of_rank(rank: int, bounds: list[int], bits: list[int]) -> int:
    return next(width for high, width in zip(bounds[1:], bits, strict=True) if rank < high)
