"""Packed bytes by hand, and round trips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_mpe.ops.reference.bitpack import pack_codes, row_bytes, unpack_codes

# Eight codes in a block, element j at bits [j * b, (j + 1) * b) of b little-endian bytes; written out by hand.
BY_HAND = [
    # 1 bit: 1 0 1 1 0 0 0 1 -> 0b10001101
    (1, [1, 0, 1, 1, 0, 0, 0, 1], [0x8D]),
    # 2 bits: 3 0 1 2 | 1 1 0 3 -> 0b10_01_00_11, 0b11_00_01_01
    (2, [3, 0, 1, 2, 1, 1, 0, 3], [0x93, 0xC5]),
    # 3 bits: 7 at bit 0, 1 at 3, 4 at 21 -> 7 + 8 + 4 * 2**21 = 0x80000F
    (3, [7, 1, 0, 0, 0, 0, 0, 4], [0x0F, 0x00, 0x80]),
    # 4 bits: a nibble each, low nibble first
    (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x21, 0x43, 0x65, 0x87]),
    # 5 bits: 31 at bit 0, 1 at 5, 16 at 35 -> 31 + 32 + 16 * 2**35 = 0x80_0000_003F
    (5, [31, 1, 0, 0, 0, 0, 0, 16], [0x3F, 0x00, 0x00, 0x00, 0x80]),
    # 6 bits: 63 at bit 0, 1 at 6, 32 at 42 -> 63 + 64 + 32 * 2**42 = 0x8000_0000_007F
    (6, [63, 1, 0, 0, 0, 0, 0, 32], [0x7F, 0x00, 0x00, 0x00, 0x00, 0x80]),
    # 7 bits: 127 at bit 0, 1 at 7, 64 at 49 -> 127 + 128 + 64 * 2**49 = 0x80_0000_0000_00FF
    (7, [127, 1, 0, 0, 0, 0, 0, 64], [0xFF, 0x00, 0x00, 0x00, 0x00, 0x00, 0x80]),
    (8, [255, 1, 0, 0, 0, 0, 0, 128], [255, 1, 0, 0, 0, 0, 0, 128]),
]


@pytest.mark.parametrize(("bits", "codes", "expected"), BY_HAND)
def test_bytes_by_hand(bits: int, codes: list[int], expected: list[int]) -> None:
    packed = pack_codes(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.tolist() == [expected]
    assert unpack_codes(packed, bits, 8).tolist() == [codes]


def test_a_row_is_whole_blocks() -> None:
    """10 elements of 3 bits: two blocks of 3 bytes, the second mostly padding."""
    assert row_bytes(10, 3) == 6
    packed = pack_codes(torch.tensor([[7] * 10], dtype=torch.uint8), 3)
    assert packed.tolist() == [[0xFF, 0xFF, 0xFF, 0b00111111, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 20), st.integers(1, 37), st.integers(0, 2**16))
def test_round_trip(bits: int, rows: int, dim: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, dim), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, -(-dim // 8) * bits)
    assert torch.equal(unpack_codes(packed, bits, dim), codes)


def test_misuse() -> None:
    with pytest.raises(ValueError, match="between 1 and 8"):
        pack_codes(torch.zeros(1, 8, dtype=torch.uint8), 9)
    with pytest.raises(TypeError, match="uint8"):
        unpack_codes(torch.zeros(1, 8), 8, 8)
    with pytest.raises(ValueError, match="rows of 6 bytes"):
        unpack_codes(torch.zeros(1, 5, dtype=torch.uint8), 3, 10)
