"""The compiled operators: loading them, and which CPU instruction set they use."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libtorchrec_mpe.so")
"""Loaded with ``torch.ops.load_library``, or ``dlopen`` in a C++ process: it registers ``torch.ops.torchrec_mpe``."""

_BUILD = "build it with `pip install --no-build-isolation -e .` in a checkout, which takes g++ or clang++"


def _load() -> str | None:
    """Load the library; returns why it could not be."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} was built for another torch or machine ({error})"
    return None


_problem = _load()
_warned = False


def is_loaded() -> bool:
    """Whether the compiled operators are there."""
    return _problem is None


def problem() -> str | None:
    """Why the compiled operators are not there, and what to do; None if they are."""
    return None if _problem is None else f"{_problem}: {_BUILD}"


def warn_once() -> None:
    """Say once per process that the pure-PyTorch reference runs instead of the compiled operators."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"the slow reference operators run, for {problem()}", RuntimeWarning, stacklevel=4)


@contextmanager
def use_cpu_capability(name: str) -> Iterator[None]:
    """Restrict the compiled CPU operators of this process to an instruction set, to test or measure it.

    Args:
        name (str): "avx512" (needs VBMI), "avx2" (needs FMA) or "scalar".

    Raises:
        ValueError: if the machine lacks it.
    """
    before = cpu_capability()
    torch.ops.torchrec_mpe.set_cpu_capability(name)
    try:
        yield
    finally:
        torch.ops.torchrec_mpe.set_cpu_capability(before)


def cpu_capability() -> str:
    """The instruction set that the compiled CPU operators use."""
    name: str = torch.ops.torchrec_mpe.cpu_capability()
    return name
