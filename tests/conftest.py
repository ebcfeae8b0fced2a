"""What must be set before any test imports Triton, options of the tests, ranks, and how workers share the tests."""

import os
from collections.abc import Iterator

import pytest
import torch
from xdist.scheduler.loadgroup import LoadGroupScheduling

from tests.distributed.ranks import Ranks

if not torch.cuda.is_available():
    # Triton reads it once; torchrec and fbgemm import Triton with the first test that needs them.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stress-seconds", type=float, default=2.0, help="how long 8 threads ask one model for answers (default: 2)"
    )
    parser.addoption(
        "--fuzz-seconds", type=float, default=10.0, help="how long artifacts are damaged at random (default: 10)"
    )
    parser.addoption("--fuzz-seed", type=int, default=0, help="the first damage (default: 0)")


@pytest.fixture
def stress_seconds(request: pytest.FixtureRequest) -> float:
    """How long tests of many threads go on."""
    seconds: float = request.config.getoption("--stress-seconds")
    return seconds


# --- Ranks: started by the first test that needs them, ended with the last test ---


@pytest.fixture(scope="session")
def lone_rank() -> Iterator[Ranks]:
    with Ranks(1) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def two_other_ranks() -> Iterator[Ranks]:
    """Processes that know nothing of what ``two_ranks`` did."""
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """As on two hosts of two ranks each."""
    with Ranks(4, ranks_per_host=2) as ranks:
        yield ranks


_RANKS = {"lone_rank", "two_ranks", "two_other_ranks", "four_ranks"}

# --- Workers of pytest-xdist: a file goes to one of them, and all that need ranks to the same ---

_LONGEST_FIRST = (
    "inference/export/test_export_aoti.py",
    "ranks",
    "examples/test_resume.py",
    "app/launch/test_faults.py",
    "precision/test_from_errors.py",
    "ops/triton/test_packed_embedding_bag.py",
    "ops/triton/test_cache_slots.py",
    "inference/export/test_export.py",
    "ops/triton/test_compile.py",
)


class _FilesAndGroups(LoadGroupScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        """The group of a marked test, the file of another."""
        return str(super()._split_scope(nodeid)).split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _FilesAndGroups:
    config.option.loadscopereorder = False
    return _FilesAndGroups(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return
    with_ranks = {item.path for item in items if _RANKS & set(getattr(item, "fixturenames", ()))}

    def place(item: pytest.Item) -> int:
        name = "ranks" if item.path in with_ranks else item.path.as_posix()
        return next((k for k, end in enumerate(_LONGEST_FIRST) if name.endswith(end)), len(_LONGEST_FIRST))

    for item in items:
        if item.path in with_ranks:
            item.add_marker(pytest.mark.xdist_group("ranks"))
    items.sort(key=place)
