"""Ops with one definition and several backends; they know tensors and packed buffers only."""

from torchrec_mpe.ops.backends import available_backends, use_backend
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.packed_embedding_bag import packed_embedding_bag
from torchrec_mpe.ops.quantization import expected_quantization, fixed_quantization
from torchrec_mpe.ops.quantize_and_pack import quantize_and_pack
from torchrec_mpe.ops.quantized_embedding_bag import expected_embedding_bag, fixed_embedding_bag
from torchrec_mpe.ops.update_rows import update_rows_

__all__ = [
    "BoundsCheckMode",
    "available_backends",
    "expected_embedding_bag",
    "expected_quantization",
    "fixed_embedding_bag",
    "fixed_quantization",
    "packed_embedding_bag",
    "quantize_and_pack",
    "update_rows_",
    "use_backend",
]
