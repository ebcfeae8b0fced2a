"""Ranks that the tests of this folder share."""

from collections.abc import Iterator

import pytest
import torch

from tests.distributed.ranks import Ranks
from torchrec_mpe.app.training.process_group import process_group


@pytest.fixture(scope="package")
def saving_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="package")
def fresh_ranks() -> Iterator[Ranks]:
    """Other processes than those that saved."""
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture
def one_rank() -> Iterator[None]:
    """This process as a world of one."""
    with process_group(torch.device("cpu")):
        yield
