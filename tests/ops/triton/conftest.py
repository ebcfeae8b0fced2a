"""Without a GPU the kernels run in Triton's interpreter, which must be asked for before triton is first imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def interpreter() -> None:
    import triton
    import triton.language as tl

    if not torch.cuda.is_available() and isinstance(tl.sum, triton.JITFunction):
        pytest.fail("triton was imported before TRITON_INTERPRET=1 was set: set it in the environment of pytest")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
