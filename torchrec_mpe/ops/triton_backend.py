"""The Triton backend of the ops: its kernels, and Triton, are imported when one first runs."""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

from torchrec_mpe.ops.backends import register


@lru_cache
def _kernel(op: str) -> Callable[..., Any]:
    try:
        import_module("triton")
    except ImportError as error:
        raise ImportError(
            f"backend triton of op {op} needs Triton: install the release that your torch was built with, "
            "`pip install triton==3.6.0` for torch 2.11, `triton==3.7.0` for torch 2.13"
        ) from error
    function: Callable[..., Any] = getattr(import_module(f"torchrec_mpe.kernels.triton.{op}"), op)
    return function


def packed_embedding_bag(*arguments: Any) -> Any:
    """See :func:`torchrec_mpe.kernels.triton.packed_embedding_bag.packed_embedding_bag`."""
    return _kernel("packed_embedding_bag")(*arguments)


def expected_quantization(*arguments: Any) -> Any:
    """See :func:`torchrec_mpe.kernels.triton.expected_quantization.expected_quantization`."""
    return _kernel("expected_quantization")(*arguments)


def fixed_quantization(*arguments: Any) -> Any:
    """See :func:`torchrec_mpe.kernels.triton.fixed_quantization.fixed_quantization`."""
    return _kernel("fixed_quantization")(*arguments)


def quantize_and_pack(*arguments: Any) -> Any:
    """See :func:`torchrec_mpe.kernels.triton.quantize_and_pack.quantize_and_pack`."""
    return _kernel("quantize_and_pack")(*arguments)


for _function in (packed_embedding_bag, expected_quantization, fixed_quantization, quantize_and_pack):
    register(_function.__name__, "triton", _function)
