"""Float rows to packed rows."""

import torch
from torch import Tensor

import torchrec_mpe.ops.reference.quantize_and_pack  # noqa: F401  (registers the reference)
from torchrec_mpe.ops import library
from torchrec_mpe.ops.backends import implementation, register
from torchrec_mpe.ops.triton_backend import quantize_and_pack as triton_quantize_and_pack


def quantize_and_pack(rows: Tensor, bits: int, alpha: Tensor, beta: Tensor, *, backend: str | None = None) -> Tensor:
    """Quantize rows to unsigned codes and pack those, 8 consecutive elements to a block of ``bits`` bytes.

    The code of an element is ``clamp(round((x - beta) / alpha), low, high) - low`` with ``low = -2**(bits - 1)`` and
    ``high = 2**(bits - 1) - 1``, by the same float32 operations in the same order as retraining's
    :func:`torchrec_mpe.ops.quantized_embedding_bag.quantized_embedding_bag`, so that packed rows are bit for bit what
    training saw. A block is a little-endian bitstream, element j in its bits ``[j * bits, (j + 1) * bits)``; elements
    beyond the last one are zero.

    Args:
        rows (Tensor): float32 [n, D], without NaN.
        bits (int): 1 to 8.
        alpha (Tensor): float32 scalar tensor, the positive step size of ``bits``, on the device of ``rows``.
        beta (Tensor): float32 [D], offset.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Returns:
        Tensor: uint8 [n, ceil(D / 8) * bits], on the device of ``rows``.

    Raises:
        TypeError: if a tensor is not float32.
        ValueError: if bits or a shape is out of range.
    """
    for name, tensor in (("rows", rows), ("alpha", alpha), ("beta", beta)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {tensor.dtype}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must lie between 1 and 8, got {bits}")
    if rows.dim() != 2 or rows.shape[1] < 1 or alpha.dim() != 0 or beta.shape != rows.shape[1:]:
        raise ValueError(
            f"rows must be [n, D], alpha a scalar and beta [D], got {list(rows.shape)}, {list(alpha.shape)} and "
            f"{list(beta.shape)}"
        )
    result: Tensor = implementation("quantize_and_pack", backend)(rows, bits, alpha, beta)
    return result


def _compiled(rows: Tensor, bits: int, alpha: Tensor, beta: Tensor) -> Tensor:
    result: Tensor = torch.ops.torchrec_mpe.quantize_and_pack(rows, bits, alpha, beta)
    return result


def _fake(rows: Tensor, bits: int, alpha: Tensor, beta: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], -(-rows.shape[1] // 8) * bits), dtype=torch.uint8)


if library.is_loaded():
    register("quantize_and_pack", "cpu", _compiled)
    torch.library.register_fake("torchrec_mpe::quantize_and_pack", _fake)
    torch.library.impl("torchrec_mpe::quantize_and_pack", "CUDA", triton_quantize_and_pack)
