"""Packing on Triton against the bitstream's definition, element by element."""

import pytest
import torch

from torchrec_mpe.ops.reference.quantize_and_pack import quantize_and_pack as reference
from torchrec_mpe.ops.triton.quantize_and_pack import quantize_and_pack


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_lies_in_its_bits(bits, device):
    codes = torch.randint(2**bits, (6, 21), generator=torch.Generator().manual_seed(bits))
    rows = (codes - 2 ** (bits - 1)) * 0.5 + 0.125
    packed = quantize_and_pack(
        rows.float().to(device), bits, torch.tensor(0.5, device=device), torch.full((21,), 0.125, device=device)
    )
    assert packed.shape == (6, 3 * bits)
    for row, line in zip(packed.tolist(), codes.tolist(), strict=True):
        stream = int.from_bytes(bytes(row), "little")
        assert [stream >> (d * bits) & (2**bits - 1) for d in range(24)] == [*line, 0, 0, 0]


@pytest.mark.parametrize("dim", [1, 5, 8, 16, 24, 64, 128])
@pytest.mark.parametrize("bits", [1, 3, 4, 7, 8])
def test_equals_the_reference(dim, bits, device):
    g = torch.Generator().manual_seed(dim)
    rows, beta = torch.randn(19, dim, generator=g) * 3, torch.randn(dim, generator=g) * 0.1
    alpha = torch.tensor(0.0371)
    ours = quantize_and_pack(rows.to(device), bits, alpha.to(device), beta.to(device)).cpu()
    assert torch.equal(ours, reference(rows, bits, alpha, beta))


def test_quotients_next_to_a_half_round_as_in_torch(device):
    # Multiples of a step size that is no power of two, and their neighbours: an approximate division errs here.
    alpha = torch.tensor(0.0171)
    exact = (torch.arange(-140, 140) + 0.5) * alpha
    infinity = torch.tensor(float("inf"))
    rows = torch.stack([exact, exact.nextafter(infinity), exact.nextafter(-infinity)], 1)
    ours = quantize_and_pack(rows.to(device), 8, alpha.to(device), torch.zeros(3, device=device)).cpu()
    assert torch.equal(ours, reference(rows, 8, alpha, torch.zeros(3)))


def test_no_rows(device):
    packed = quantize_and_pack(
        torch.empty(0, 16, device=device), 3, torch.tensor(1.0, device=device), torch.zeros(16, device=device)
    )
    assert packed.shape == (0, 6)
