"""What must be set before any test imports Triton, and options of the tests."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it once; torchrec and fbgemm import Triton with the first test that needs them.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stress-seconds", type=float, default=3.0, help="how long 8 threads ask one model for answers (default: 3)"
    )


@pytest.fixture
def stress_seconds(request: pytest.FixtureRequest) -> float:
    """How long tests of many threads go on."""
    seconds: float = request.config.getoption("--stress-seconds")
    return seconds
