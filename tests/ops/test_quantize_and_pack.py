"""Packed rows are bit for bit what training's fake quantizer made of them."""

import pytest
import torch

from tests.ops.test_quantize_rows import quantize
from torchrec_mpe.ops.backends import use_backend
from torchrec_mpe.ops.quantize_and_pack import quantize_and_pack
from torchrec_mpe.ops.reference.bitpack import unpack_codes


@pytest.mark.parametrize("dim", [1, 8, 20])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_the_fake_quantizers(bits: int, dim: int) -> None:
    g = torch.Generator().manual_seed(bits)
    rows = torch.randn(200, dim, generator=g)
    alpha, beta = torch.rand((), generator=g) / 2**bits + 1e-3, torch.randn(dim, generator=g) / 10
    packed = quantize_and_pack(rows, bits, alpha, beta, backend="reference")
    assert packed.dtype == torch.uint8 and packed.shape == (200, -(-dim // 8) * bits)
    with use_backend("reference"):
        zeros, one = torch.zeros(200).long(), torch.ones(1)
        quantized = quantize(rows, zeros, None, alpha.view(1), beta, None, None, (bits,), one)
    codes = unpack_codes(packed, bits, dim).float() - 2 ** (bits - 1)
    assert torch.equal(torch.addcmul(beta, codes, alpha), quantized)


def test_halves_go_to_even_and_ends_are_clamped() -> None:
    row = torch.tensor([[0.5, 1.5, -0.5, -1.5, 99, -99, float("inf"), float("-inf")]])
    packed = quantize_and_pack(row, 3, torch.tensor(1.0), torch.zeros(8), backend="reference")
    assert unpack_codes(packed, 3, 8).tolist() == [[4, 6, 4, 2, 7, 0, 7, 0]]


def test_misuse() -> None:
    rows, one, beta = torch.zeros(3, 8), torch.tensor(1.0), torch.zeros(8)
    with pytest.raises(TypeError, match="rows must be float32"):
        quantize_and_pack(rows.double(), 4, one, beta)
    with pytest.raises(ValueError, match="between 1 and 8"):
        quantize_and_pack(rows, 0, one, beta)
    with pytest.raises(ValueError, match=r"beta \[D\], got \[3, 8\], \[\] and \[7\]"):
        quantize_and_pack(rows, 4, one, beta[:7])
    assert quantize_and_pack(rows[:0], 4, one, beta, backend="reference").shape == (0, 4)
