"""Philox against the known answers of its authors, and how columns draw from it."""

import pytest
import torch

from torchrec_mpe.ops.reference.philox import noise16, philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, philox4x32, 10 rounds
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, int, int, int], key: int, expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), key)) == expected


def test_a_shard_draws_what_the_whole_table_draws() -> None:
    rows = torch.tensor([5, 2**32 + 5])
    whole = noise16(rows, 7, 0, 0, 64, 11)
    assert torch.equal(noise16(rows, 7, 0, 16, 20, 11), whole[:, 16:36])
    assert not torch.equal(whole[0], whole[1])


def test_draws_differ_by_row_batch_stream_and_seed_and_are_uniform() -> None:
    rows = torch.arange(3000)
    draws = [noise16(rows, b, s, 0, 16, k).flatten() for b, s, k in ((1, 0, 3), (2, 0, 3), (1, 1, 3), (1, 0, 4))]
    for i, draw in enumerate(draws):
        assert draw.min() >= 0 and draw.max() <= 0xFFFF
        # 48,000 draws: chi-squared of 256 classes has mean 255 and deviation 22.6; 400 is 6.4 of them away.
        seen = torch.bincount(draw >> 8, minlength=256).double()
        assert ((seen - 187.5) ** 2 / 187.5).sum() < 400
        for other in draws[:i]:
            assert (draw == other).float().mean() < 1e-3
