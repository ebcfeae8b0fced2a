"""Ranks that all tests of this folder share; how long, and from which seed, artifacts are damaged at random."""

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks

FUZZ_SECONDS = 15.0
FUZZ_SEED = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known to pytest when tests/inference, or a file of it, is on its command line."""
    parser.addoption("--fuzz-seconds", type=float, default=FUZZ_SECONDS)
    parser.addoption("--fuzz-seed", type=int, default=FUZZ_SEED)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks
