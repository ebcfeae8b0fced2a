"""Ranks that all tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """As on two hosts of two ranks each."""
    with Ranks(4, ranks_per_host=2) as ranks:
        yield ranks
