"""Codes of transformed rows to bits and back, in pure PyTorch."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def read_codes(weights: Tensor, starts: Tensor, component_bits: Sequence[int]) -> Tensor:
    """The codes of rows whose components follow each other, each from its lowest bit on.

    Args:
        weights (Tensor): uint8, with a byte after the last row's.
        starts (Tensor): int64 [n], the bit of ``weights`` where each row starts.
        component_bits (Sequence[int]): K bit-widths, 0 to 8.

    Returns:
        Tensor: uint8 [n, K]; 0 for components of 0 bits.
    """
    codes = torch.zeros((starts.numel(), len(component_bits)), dtype=torch.uint8, device=weights.device)
    for k, first in enumerate(accumulate(component_bits, initial=0)):
        if k < len(component_bits) and component_bits[k]:
            place = starts + first
            byte = place >> 3
            word = weights[byte].int() | weights[byte + 1].int() << 8
            codes[:, k] = (word >> (place & 7).int()) & ((1 << component_bits[k]) - 1)
    return codes


def write_codes_(weights: Tensor, starts: Tensor, component_bits: Sequence[int], codes: Tensor) -> None:
    """Write what :func:`read_codes` reads, into bits that are zero.

    Args:
        weights (Tensor): uint8.
        starts (Tensor): int64 [n], the bit where each row starts; no two rows share a bit.
        component_bits (Sequence[int]): K bit-widths, 0 to 8.
        codes (Tensor): uint8 [n, K], each below ``2**bits`` of its component.
    """
    for k, first in enumerate(accumulate(component_bits, initial=0)):
        if k < len(component_bits) and component_bits[k]:
            place = starts + first
            byte, shift = place >> 3, (place & 7).int()
            word = codes[:, k].int() << shift
            # Bits that no other code has: to add is to set.
            weights.index_add_(0, byte, (word & 255).to(torch.uint8))
            beyond = (word > 255).nonzero().squeeze(1)
            weights.index_add_(0, byte[beyond] + 1, (word[beyond] >> 8).to(torch.uint8))
