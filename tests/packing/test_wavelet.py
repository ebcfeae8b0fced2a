"""Wavelet directories: their splits, their bytes by hand, how few they are, and damage."""

import dataclasses
import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.packing.random_codings import coded_table, random_coding
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.reference.wavelet_ranks import Split, wavelet_ranks
from torchrec_mpe.packing.pack import pack_tables
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.table_coding import TableCoding, TransformedRows
from torchrec_mpe.packing.validate import validate_packed_tables
from torchrec_mpe.packing.wavelet_lines import stored_ranks, write_wavelet
from torchrec_mpe.packing.wavelet_splits import choose_splits, remap_bytes, wavelet_bytes


def coding_of(run_rows: tuple[int, ...], order: Tensor) -> TableCoding:
    """Every group codes its one component in a bit."""
    groups = tuple(TransformedRows((1, 0, 0, 0, 0), (1.0,), (0.0,), 1) for _ in run_rows)
    bounds = (0, *accumulate(run_rows))
    return TableCoding(bounds[-1], 1, bounds, groups, torch.ones(2, 1).half(), torch.ones(1, 1), None, order)


def test_bytes_by_hand() -> None:
    """Ids 0, 3, 6, ... are of the first run, of the others two in three of the last one."""
    order = torch.empty(600, dtype=torch.int32)
    ids = torch.arange(600)
    order[ids % 3 == 0] = torch.arange(200, dtype=torch.int32).flip(0)
    order[ids % 3 == 1] = torch.arange(200, 400, dtype=torch.int32)
    order[ids % 3 == 2] = torch.arange(400, 600, dtype=torch.int32)
    ranks = stored_ranks(coding_of((200, 400), order))
    assert ranks[:6].tolist() == [0, 200, 201, 1, 202, 203]  # in the order of ids, whatever their places
    splits = (Split(0, 600, 200, 1, 0, 0),)
    out = torch.zeros(wavelet_bytes(splits), dtype=torch.uint8)
    assert out.numel() == 3 * 64
    write_wavelet(ranks, splits, out)
    assert out[:64].view(torch.int32).tolist() == [0, 600, 200, 1, 0, 0, 1, 1] + [0] * 8
    assert out[64:72].view(torch.int64).item() == 0 and out[128:136].view(torch.int64).item() == 150
    assert out[72:75].tolist() == [0b01001001, 0b10010010, 0b00100100]
    assert torch.equal(wavelet_ranks(ids, out), ranks.long())


@settings(max_examples=60, deadline=None)
@given(
    run_rows=st.lists(st.one_of(st.integers(1, 4), st.integers(1, 3000)), min_size=2, max_size=40),
    seed=st.integers(0, 10**6),
)
def test_every_id_finds_its_rank(run_rows: list[int], seed: int) -> None:
    splits = choose_splits(tuple(run_rows))
    if not splits:
        return
    rows = sum(run_rows)
    ranks = stored_ranks(
        coding_of(tuple(run_rows), torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).int())
    )
    out = torch.zeros(wavelet_bytes(splits), dtype=torch.uint8)
    assert out.numel() < remap_bytes(rows)
    write_wavelet(ranks, splits, out)
    assert torch.equal(wavelet_ranks(torch.arange(rows), out), ranks.long())


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    coding = random_coding(1, 3000, 8, 4, remap=True)
    whole = pack_tables([coded_table("t", *coding)])
    for module in ("wavelet_lines", "directory_lines"):
        monkeypatch.setattr(f"torchrec_mpe.packing.{module}._CHUNK_ROWS", 37)
    parts = pack_tables([coded_table("t", *coding)])
    assert torch.equal(whole.directory, parts.directory) and torch.equal(whole.weights, parts.weights)


def test_few_bits_a_row() -> None:
    """Close to the entropy of the runs: 1.14 bits a row where two of a bit each hold them, not 4.3 or 32."""
    for run_rows, bits in (
        ((500_000, 500_000), 1.2),
        ((100_000, 900_000), 1.2),
        ((1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 128_000, 256_000), 2.8),
        (tuple(round(1000 * 2 ** (k / 2)) for k in range(21)), 4.3),
    ):
        rows = sum(run_rows)
        entropy = -sum(n / rows * math.log2(n / rows) for n in run_rows)
        size = 8 * wavelet_bytes(choose_splits(run_rows)) / rows
        assert entropy < size < bits


def test_where_a_remap_is_smaller() -> None:
    assert choose_splits((5,)) == () and choose_splits((3, 4)) == () and choose_splits((1,) * 40) == ()


def wavelet_table() -> PackedTables:
    coding, values = random_coding(5, 3000, 8, 4, remap=True)
    packed = pack_tables([coded_table("t", coding, values)])
    assert packed.directory_kinds.tolist() == [Directory.WAVELET]
    return packed


def test_any_changed_byte_is_refused_or_harmless() -> None:
    packed = wavelet_table()
    validate_packed_tables(packed)
    room = 8 * (packed.weights.numel() - 64)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    positions = [*range(192), *torch.randint(192, packed.directory.numel(), (200,), generator=generator).tolist()]
    for position in positions:
        directory = packed.directory.clone()
        directory[position] ^= int(torch.randint(1, 256, (1,), generator=generator))
        changed = dataclasses.replace(packed, directory=directory)
        try:
            validate_packed_tables(changed)
        except ValueError:
            refused += 1
            continue
        located = changed.locate(0, torch.arange(3000))
        assert ((located.starts >= 0) & (located.starts < room))[located.coding != 0].all()
    assert refused > 0.9 * len(positions)


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 1, "table t: split 0 of its directory does not follow"),
        (2, 0, "table t: split 0 of its directory does not follow"),
        (3, 1000, "table t: split 0 of its directory does not follow"),
        (4, 999, "table t: split 0 of its directory does not follow"),
        (6, 0, "table t: 0 splits, of which a row meets"),
        (6, 1000, "table t: 1000 splits"),
        (7, 1, "table t: the splits of its directory are not those"),
        (14, 1, "table t: what splits of its directory do not use must be zero"),
    ],
)
def test_splits_that_lie(word: int, value: int, message: str) -> None:
    packed = wavelet_table()
    packed.directory.view(torch.int32)[word] = value
    with pytest.raises(ValueError, match=message):
        validate_packed_tables(packed)
