"""What must be set before any test imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it once; torchrec and fbgemm import Triton with the first test that needs them.
    os.environ.setdefault("TRITON_INTERPRET", "1")
