"""This process as a world of one."""

from collections.abc import Iterator

import pytest
import torch

from torchrec_mpe.app.training.process_group import process_group


@pytest.fixture
def one_rank() -> Iterator[None]:
    with process_group(torch.device("cpu")):
        yield
