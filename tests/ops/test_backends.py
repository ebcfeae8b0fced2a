"""Choosing a backend, from several threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from torchrec_mpe.ops import backends
from torchrec_mpe.ops.backends import chosen_backend, use_backend


def test_choices_nest() -> None:
    with use_backend("reference"):
        with use_backend("triton"):
            assert chosen_backend() == "triton" and backends._chosen_for_compile == "triton"
        assert chosen_backend() == "reference" and backends._chosen_for_compile == "reference"
    assert chosen_backend() is None and backends._chosen_for_compile is None
    with pytest.raises(ValueError, match="no backend fastest; available: "), use_backend("fastest"):
        pass
    assert backends._chosen_for_compile is None


def test_blocks_of_threads_may_end_in_any_order() -> None:
    """No choice outlives its block, also not for torch.compile, which sees those of all threads."""
    first_is_open, second_is_open, first_is_over = threading.Event(), threading.Event(), threading.Event()

    def first() -> str | None:
        with use_backend("reference"):
            first_is_open.set()
            assert second_is_open.wait(30)
            chosen = chosen_backend()
        first_is_over.set()
        return chosen

    def second() -> tuple[str | None, str | None]:
        with use_backend("triton"):
            second_is_open.set()
            assert first_is_over.wait(30)
            return chosen_backend(), backends._chosen_for_compile

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert first_is_open.wait(30)
        two = pool.submit(second)
        assert one.result() == "reference" and two.result() == ("triton", "triton")
    assert chosen_backend() is None and backends._chosen_for_compile is None
