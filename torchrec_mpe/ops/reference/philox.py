"""Philox-4x32-10, the counter-based generator of stochastic rounding, in pure PyTorch."""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter.

    From Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): ten rounds, key = seed.

    Args:
        counter (Tuple[Tensor, ...]): four int64 tensors of one shape, values below 2^32.
        seed (int): below 2^64.

    Returns:
        Tuple[Tensor, ...]: four int64 tensors of that shape, values below 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def noise16(rows: Tensor, batch: int, stream: int, first_column: int, columns: int, seed: int) -> Tensor:
    """Uniform 16-bit integers, one for each of some columns of some rows.

    Eight columns share a Philox call: counter = (row mod 2^32, batch, first column of the eight,
    stream + 256 * (row div 2^32)), its four words taken low half first.

    Args:
        rows (Tensor): int64 [n], numbers in the whole table.
        batch (int): number of the batch that writes, mod 2^32.
        stream (int): what the noise is for, below 256.
        first_column (int): of the shard.
        columns (int): how many.
        seed (int): of the table, below 2^64.

    Returns:
        Tensor: int64 [n, columns], 0 to 65535.
    """
    blocks = -(-columns // 8)
    c2 = (first_column + 8 * torch.arange(blocks, device=rows.device)).expand(len(rows), blocks)
    c0 = (rows & _MASK)[:, None].expand_as(c2)
    c1 = torch.full_like(c0, batch & _MASK)
    c3 = (stream + 256 * (rows >> 32))[:, None].expand_as(c2)
    words = torch.stack(philox((c0, c1, c2, c3), seed), dim=-1)  # [n, blocks, 4]
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # [n, blocks, 4, 2]
    return halves.flatten(1)[:, :columns]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers, in int64 without overflow."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    upper = high + (low >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (low & 0xFFFF)
