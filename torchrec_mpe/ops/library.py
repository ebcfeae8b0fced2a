"""The compiled operators: loading them, and which CPU instruction set they use."""

import mmap
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from torchrec_mpe.upstream.versions import mix_release

LIBRARY = Path(__file__).with_name("libtorchrec_mpe.so")
"""Loaded with ``torch.ops.load_library``, or ``dlopen`` in a C++ process: it registers ``torch.ops.torchrec_mpe``."""

_BUILD = "build it with `pip install --no-build-isolation -e .` in a checkout, which takes g++ or clang++"


def torch_built_for(library: Path) -> str | None:
    """The torch release that a build of the library says it was built for."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb"torchrec_mpe was built for torch ([\w.+]+)", content)
        return found[1].decode() if found else None


def _load() -> str | None:
    """Load the library; returns why it could not be.

    Between releases of torch, (major, minor), layouts and symbols change: a library may load all the same, and crash.
    """
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built"
    built_for = torch_built_for(LIBRARY)
    if built_for is not None and mix_release(built_for) != mix_release(torch.__version__):
        return f"{LIBRARY.name} was built for torch {built_for}, and this is torch {torch.__version__}"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} was built for another torch or machine ({error})"
    return None


_problem = _load()
_warned = False


if _problem is not None and LIBRARY.exists():
    warnings.warn(f"torchrec_mpe: {_problem}: {_BUILD}", RuntimeWarning, stacklevel=2)


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
