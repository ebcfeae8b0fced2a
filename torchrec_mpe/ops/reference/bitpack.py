"""Codes of 1 to 8 bits to bytes and back."""

import sys

import torch
from torch import Tensor

BLOCK_DIMS = 8
"""Consecutive elements of a row that share a block of exactly ``bits`` bytes."""

_CHUNK_BLOCKS = 1 << 19  # 8-byte words of 4 MiB at a time, small beside any input worth chunking


def row_bytes(embedding_dim: int, bits: int) -> int:
    """Bytes of one packed row: ``ceil(embedding_dim / 8) * bits``."""
    return -(-embedding_dim // BLOCK_DIMS) * bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes, 8 consecutive elements of a row to a block of ``bits`` bytes.

    A block is a little-endian bitstream: element j occupies its bits ``[j * bits, (j + 1) * bits)``. Elements beyond
    the last one are zero. At 3 bits a block is 24 bits::

        byte      |       0       |       1       |       2       |
        bit       |0 1 2 3 4 5 6 7|0 1 2 3 4 5 6 7|0 1 2 3 4 5 6 7|
        element   |0 0 0 1 1 1 2 2|2 3 3 3 4 4 4 5|5 5 6 6 6 7 7 7|

    Args:
        codes (Tensor): uint8 [n, D], each below ``2**bits``.
        bits (int): 1 to 8.

    Returns:
        Tensor: uint8 [n, ceil(D / 8) * bits], on the device of ``codes``.

    Raises:
        TypeError: if codes is not uint8.
        ValueError: if bits, the shape or a code is out of range.

    Example::

        >>> pack_codes(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.uint8), 3).tolist()
        [[136, 198, 250]]
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    if codes.dim() != 2 or codes.shape[1] < 1:
        raise ValueError(f"codes must be [n, D] with D >= 1, got {list(codes.shape)}")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code of {bits} bits must lie below {1 << bits}, got {int(codes.max())}")
    n, dim = codes.shape
    blocks = -(-dim // BLOCK_DIMS)
    packed = torch.empty((n, blocks * bits), dtype=torch.uint8, device=codes.device)
    step = max(1, _CHUNK_BLOCKS // blocks)
    for start in range(0, n, step):
        chunk = codes[start : start + step]
        padded = torch.nn.functional.pad(chunk, (0, blocks * BLOCK_DIMS - dim)).view(-1, BLOCK_DIMS)
        words = torch.zeros(padded.shape[0], dtype=torch.int64, device=codes.device)
        for j in range(BLOCK_DIMS):
            # At 8 bits the last shift reaches the sign bit; two's complement keeps the bytes right.
            words |= padded[:, j].long() << (j * bits)
        as_bytes = words.view(torch.uint8).view(-1, 8)
        packed[start : start + step] = as_bytes[:, :bits].reshape(chunk.shape[0], blocks * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int, embedding_dim: int) -> Tensor:
    """The inverse of :func:`pack_codes`.

    Args:
        packed (Tensor): uint8 [n, ceil(embedding_dim / 8) * bits].
        bits (int): 1 to 8.
        embedding_dim (int): D, elements of a row.

    Returns:
        Tensor: unsigned codes, uint8 [n, embedding_dim].

    Raises:
        TypeError: if packed is not uint8.
        ValueError: if bits or the shape is wrong.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed rows must be uint8, got {packed.dtype}")
    if packed.dim() != 2 or packed.shape[1] != row_bytes(embedding_dim, bits):
        raise ValueError(
            f"{embedding_dim} elements of {bits} bits are rows of {row_bytes(embedding_dim, bits)} bytes, "
            f"got {list(packed.shape)}"
        )
    n = packed.shape[0]
    blocks = -(-embedding_dim // BLOCK_DIMS)
    codes = torch.empty((n, embedding_dim), dtype=torch.uint8, device=packed.device)
    step = max(1, _CHUNK_BLOCKS // blocks)
    for start in range(0, n, step):
        chunk = packed[start : start + step]
        as_bytes = torch.zeros((chunk.shape[0] * blocks, 8), dtype=torch.uint8, device=packed.device)
        as_bytes[:, :bits] = chunk.reshape(-1, bits)
        words = as_bytes.view(torch.int64).view(-1)
        padded = torch.empty((words.shape[0], BLOCK_DIMS), dtype=torch.uint8, device=packed.device)
        for j in range(BLOCK_DIMS):
            padded[:, j] = (words >> (j * bits)) & ((1 << bits) - 1)
        codes[start : start + step] = padded.view(chunk.shape[0], blocks * BLOCK_DIMS)[:, :embedding_dim]
    return codes


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must lie between 1 and 8, got {bits}")
    if sys.byteorder != "little":
        raise RuntimeError("the packed format is read and written on little-endian machines only")
