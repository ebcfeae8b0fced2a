"""Corrupt tensors are refused, by table."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.packing.test_packing import to_pack
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import pack_tables
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.validate import validate_packed_tables

RANKED, REMAP, NIBBLE, BITMAP, BOTH = range(5)  # tables of the fixture below


def tables() -> PackedTables:
    """One table of each kind, of 500 rows: two bitmap lines and five nibble lines; BOTH has two over its kept rows."""
    g = torch.Generator().manual_seed(0)
    several, kept = ((0, 10, 200, 500), (6, 3, 0)), ((0, 200, 500), (4, 0))
    chosen = (("ranked", several), ("remap", several), ("nibble", several), ("bitmap", kept), ("bitmap", several))
    packed = pack_tables(
        [
            to_pack(
                f"t{k}",
                TableBitWidths(
                    500, 8, bounds, bits, None if k == RANKED else torch.randperm(500, generator=g).to(torch.int32)
                ),
                directory=directory,
            )
            for k, (directory, (bounds, bits)) in enumerate(chosen)
        ]
    )
    assert packed.directory_kinds.tolist() == [RANKED, REMAP, NIBBLE, BITMAP, BOTH]
    return packed


def part(tensors: dict[str, Tensor], t: int) -> Tensor:
    """The lines of table t and what follows them, [lines, 64]."""
    return tensors["directory"][int(tensors["directory_offsets"][t]) :].view(-1, 64)


Tensors = dict[str, Tensor]


def put(tensor: Tensor, position: int | tuple[int, ...], value: int | float) -> None:
    tensor[position] = value


def set_in(name: str, position: int | tuple[int, ...], value: int | float) -> Callable[[Tensors], None]:
    return lambda t: put(t[name], position, value)


def shorten(name: str, by: int) -> Callable[[Tensors], None]:
    return lambda t: t.update({name: t[name][:-by].clone()})


def swap_nibbles(tensors: Tensors) -> None:
    """A row that moves two bits of width into the line before: sums of all lines stay."""
    lines = part(tensors, NIBBLE)
    byte = int((lines[0, 4:] & 15 <= 6).nonzero()[0]) + 4
    lines[0, byte] += 1


CORRUPTIONS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "dtype": (lambda t: t.update(weights=t["weights"].int()), "weights must be torch.uint8"),
    "shape": (shorten("weights_offsets", 1), r"weights_offsets must be torch.int64 \[5\]"),
    "strides": (lambda t: t.update(run_records=t["run_records"].t().contiguous().t()), "run_records must be contig"),
    "not finite": (set_in("beta", 0, float("inf")), "beta must be finite"),
    "no end padding": (shorten("weights", 64), "table t4"),
    "hardly any weights": (lambda t: t.update(weights=t["weights"][:10].clone()), "weights must end with 64 bytes"),
    "rows": (set_in("rows_per_table", 0, 501), "table t0: rows_per_table says 501"),
    "kind": (set_in("directory_kinds", 2, 6), "table t2: there is no directory kind 6"),
    "coded kind": (set_in("directory_kinds", REMAP, 5), "table t1: a table that is not coded cannot have a WAVELET"),
    "negative kind": (set_in("directory_kinds", 2, -1), "table t2: there is no directory kind -1"),
    "another kind": (set_in("directory_kinds", NIBBLE, BOTH), "table t2"),
    "ranked with lines": (set_in("directory_kinds", REMAP, RANKED), "table t1: RANKED does not go with"),
    "table not aligned": (set_in("weights_offsets", 1, 63), "table t1: it starts at byte 63"),
    "table before its turn": (set_in("weights_offsets", 3, 0), "table t2: it starts at"),
    "table beyond the weights": (set_in("weights_offsets", 4, 1 << 40), "table t4: it starts at"),
    "negative table": (set_in("weights_offsets", 0, -64), "table t0: it starts at byte -64"),
    "tables too close": (set_in("weights_offsets", 3, 64), "table t2"),
    "directory not aligned": (set_in("directory_offsets", REMAP, 4), "directory must start"),
    "directory offset": (set_in("directory_offsets", NIBBLE, 2000), "table t2: its directory lies at bytes 2000"),
    "directory beyond": (set_in("directory_offsets", BOTH, 1 << 40), "table t3"),
    "no lines": (set_in("directory_offsets", NIBBLE, -1), "table t2: NIBBLE does not go with directory offset -1"),
    "wild offset": (set_in("directory_offsets", BOTH, -64), "table t4: BITMAP_NIBBLE does not go with"),
    "short directory": (shorten("directory", 64), "table t4"),
    "odd directory": (shorten("directory", 1), "directory must be a multiple of 64"),
    "run offsets": (set_in("run_offsets", 1, 0), "table t0: a RANKED directory has at least one run, not 0"),
    "run offsets fall": (set_in("run_offsets", 1, 100), "table t0: run_offsets must not fall"),
    "run offsets end": (set_in("run_offsets", 5, 6), "run_offsets must go from 0 to 7"),
    "runs of nibbles": (set_in("run_offsets", 3, 7), "table t2: a NIBBLE directory has no runs, not 1"),
    "first run": (set_in("run_starts", 0, 1), "table t0: the first run must start at rank 0"),
    "run starts": (set_in("run_starts", 2, 10), "table t0: run starts must increase"),
    "run beyond": (set_in("run_starts", 2, 600), "table t0: the run at rank 10 lies at"),
    "run bits": (set_in("run_records", (0, 1), 9 | 9 << 32), "bit-widths between 0 and 8"),
    "negative run bits": (set_in("run_records", (0, 1), -1), "bit-widths between 0 and 8"),
    "row bits": (
        set_in("run_records", (0, 1), 56 | 6 << 32),
        "table t0: rows of 8 elements of coding 0x6 take 48 bits",
    ),
    "run base": (set_in("run_records", (0, 0), 8), "table t0: the run at rank 0 lies at bits 8"),
    "run base within a byte": (set_in("run_records", (0, 0), 1), "table t0: the run at rank 0 lies at bits 1"),
    "run base outside": (set_in("run_records", (0, 0), 64 << 30), "table t0: the run at rank 0 lies at"),
    "negative base": (set_in("run_records", (0, 0), -512), "table t0: the run at rank 0 lies at bits -512"),
    "base of no bits": (set_in("run_records", (2, 0), 64), "table t0: the 0-bit run"),
    "bitmap of no bits": (set_in("run_records", (6, 1), 0), "table t3: the rows that a bitmap keeps"),
    "remap outside": (lambda t: put(part(t, REMAP).view(torch.int32), (0, 0), 500), r"table t1: remap must be"),
    "remap negative": (lambda t: put(part(t, REMAP).view(torch.int32), (0, 0), -1), r"table t1: remap must be"),
    "remap twice": (lambda t: part(t, REMAP)[0, :4].copy_(part(t, REMAP)[0, 4:8]), "table t1: .* a permutation"),
    "after the remap": (lambda t: put(part(t, REMAP), (31, 63), 1), "table t1: the directory's alignment"),
    "nibble above 8": (lambda t: put(part(t, NIBBLE), (1, 4), 9), "table t2: the width of stored row 120 is 9"),
    "wider row": (swap_nibbles, "table t2: line 1 of its directory has base"),
    "nibble base": (lambda t: put(part(t, NIBBLE), (3, 3), 255), "table t2: line 3 of its directory has base"),
    "first nibble base": (lambda t: put(part(t, NIBBLE), (0, 0), 1), "table t2: line 0 of its directory has base 1"),
    "after the nibbles": (lambda t: put(part(t, NIBBLE), (4, 63), 1), "table t2: .* widths after row 499"),
    "last row outside": (lambda t: part(t, NIBBLE)[4, 4:14].fill_(0x88), "table t2: its rows take"),
    "bitmap rank": (lambda t: put(part(t, BITMAP), (1, 0), 7), "table t3"),
    "huge bitmap rank": (lambda t: put(part(t, BITMAP), (1, 6), 1), "table t3: its bitmap keeps"),
    "negative bitmap rank": (lambda t: put(part(t, BITMAP), (1, 7), 255), "table t3: its bitmap keeps"),
    "first bitmap rank": (lambda t: put(part(t, BITMAP), (0, 0), 1), "table t3: line 0 of its directory has rank 1"),
    "bitmap bit": (lambda t: part(t, BITMAP)[0, 8].bitwise_xor_(torch.tensor(1).byte()), "table t3: line 1"),
    "bits after the rows": (
        lambda t: put(part(t, BITMAP), (1, 63), 128),
        "table t3: the bitmap has bits after row 499",
    ),
    "huge rank before nibbles": (lambda t: put(part(t, BOTH), (1, 6), 1), "table t4: its bitmap keeps"),
    "rank before nibbles": (lambda t: put(part(t, BOTH), (1, 0), 255), "table t4"),
    "nibbles of kept rows": (lambda t: put(part(t, BOTH), (2, 4), 0x30), "table t4: the width of stored row 0 is 0"),
    "scale set": (set_in("scale_index", 1, 1), "table t1: scale_index 1"),
    "beta outside": (set_in("beta_offsets", 0, 1), "beta offset 1"),
    "zero row outside": (set_in("zero_row_offsets", 4, 40), "table t4: zero row offset 40"),
    "step of no bits": (set_in("alpha", (0, 0), 1), "step sizes must be 0 for 0 bits"),
    "step in use": (set_in("alpha", (0, 6), 0), "step sizes must be 0 for 0 bits"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corrupt_tensors_are_refused(corruption: str) -> None:
    packed = tables()
    validate_packed_tables(packed)
    tensors = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    corrupt, message = CORRUPTIONS[corruption]
    corrupt(tensors)
    with pytest.raises(ValueError, match=message):
        validate_packed_tables(dataclasses.replace(packed, **tensors))


@pytest.mark.parametrize("lines", [1, 1 << 14])
def test_any_changed_byte_of_a_directory_is_refused_or_harmless(lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever passes leads every id to bytes of its table."""
    monkeypatch.setattr("torchrec_mpe.packing.validate_directory._CHUNK_LINES", lines)
    packed = tables()
    validate_packed_tables(packed)
    starts = packed.weights_offsets.tolist()
    sizes = [end - start for start, end in zip(starts, [*starts[1:], packed.weights.numel() - 64], strict=True)]
    refused = 0
    generator = torch.Generator().manual_seed(0)
    for position in torch.randperm(packed.directory.numel(), generator=generator)[:300].tolist():
        directory = packed.directory.clone()
        directory[position] ^= int(torch.randint(1, 256, (1,), generator=generator))
        changed = dataclasses.replace(packed, directory=directory)
        try:
            validate_packed_tables(changed)
        except ValueError:
            refused += 1
            continue
        for t in range(len(packed.tables)):
            located = changed.locate(t, torch.arange(500))
            first, bits = located.starts >> 3, located.coding
            assert ((first >= 0) & (first + bits <= sizes[t]))[bits > 0].all()
    assert refused > 200
