"""Rows to packed rows in pure PyTorch: the definition that every backend is tested against."""

import torch
from torch import Tensor

from torchrec_mpe.ops.backends import register
from torchrec_mpe.ops.reference.bitpack import pack_codes
from torchrec_mpe.ops.reference.quantize_rows import code_range


@torch.no_grad()
def quantize_and_pack(rows: Tensor, bits: int, alpha: Tensor, beta: Tensor) -> Tensor:
    """See :func:`torchrec_mpe.ops.quantize_and_pack`."""
    low, high = code_range(bits)
    # The fake quantizer's float32 operations in its order: the codes are those that training rounded to.
    codes = ((rows - beta) / alpha).round_().clamp_(low, high).sub_(low)
    return pack_codes(codes.to(torch.uint8), bits)


register("quantize_and_pack", "reference", quantize_and_pack)
