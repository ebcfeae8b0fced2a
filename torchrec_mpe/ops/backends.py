"""Which implementation of an op runs: an explicit choice, or the fastest for the tensors' device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch

from torchrec_mpe.ops import library

BACKENDS = ("reference", "cpu", "triton")

_chosen: ContextVar[str | None] = ContextVar("torchrec_mpe_backend", default=None)
_chosen_for_compile: str | None = None  # torch.compile sees plain globals only: the last choice of any thread
_open_blocks: dict[object, str] = {}  # of use_backend in all threads, which may end in any order
_open_blocks_lock = Lock()
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}


def register(op: str, backend: str, implementation: Callable[..., Any]) -> None:
    """Make ``implementation`` the one that ``backend`` runs for ``op``."""
    _implementations.setdefault(op, {})[backend] = implementation


def available_backends(op: str | None = None) -> list[str]:
    """Names of the backends that implement ``op``, or any op."""
    if op is not None:
        return sorted(_implementations[op])
    return sorted(name for name in BACKENDS if name != "cpu" or library.is_loaded())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on the named backend.

    Raises:
        ValueError: if no op has such a backend.

    Example::

        with use_backend("reference"):
            output = model(batch)
    """
    if name not in available_backends():
        raise ValueError(f"no backend {name}; available: {', '.join(available_backends())}")
    global _chosen_for_compile
    token, block = _chosen.set(name), object()
    with _open_blocks_lock:
        _open_blocks[block] = _chosen_for_compile = name
    try:
        yield
    finally:
        _chosen.reset(token)
        with _open_blocks_lock:
            del _open_blocks[block]
            _chosen_for_compile = next(reversed(_open_blocks.values()), None)


def chosen_backend() -> str | None:
    """The backend of the innermost :func:`use_backend`, if any."""
    return _chosen_for_compile if torch.compiler.is_compiling() else _chosen.get()


def implementation(op: str, backend: str | None = None) -> Callable[..., Any]:
    """The function that runs ``op``: ``backend``'s if given, else that of :func:`use_backend`, else the dispatcher's.

    The dispatcher's is the compiled op ``torch.ops.torchrec_mpe.<op>``, C++ on CPU tensors and Triton on CUDA tensors.
    Where the library is not built it is the reference, with one warning per process.

    Raises:
        ValueError: if the asked-for backend does not implement the op.
    """
    table = _implementations[op]
    backend = backend or chosen_backend()
    if backend is None:
        if library.is_loaded():
            return table["cpu"]  # torch.ops, which also dispatches CUDA tensors
        library.warn_once()
        return table["reference"]
    if backend not in table:
        why = f" ({library.problem()})" if backend == "cpu" and not library.is_loaded() else ""
        raise ValueError(f"op {op} has no backend {backend}{why}; available: {', '.join(sorted(table))}")
    return table[backend]
