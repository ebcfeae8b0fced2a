"""Which implementation of an op runs: an explicit choice, or the best one that is available."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_chosen: ContextVar[str | None] = ContextVar("torchrec_mpe_backend", default=None)
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}


def register(op: str, backend: str, implementation: Callable[..., Any]) -> None:
    """Make ``implementation`` the one that ``backend`` runs for ``op``."""
    _implementations.setdefault(op, {})[backend] = implementation


def available_backends(op: str | None = None) -> list[str]:
    """Names of the backends that implement ``op``, or any op."""
    tables = [_implementations.get(op, {})] if op is not None else list(_implementations.values())
    return sorted({name for table in tables for name in table})


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
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def implementation(op: str, backend: str | None = None) -> Callable[..., Any]:
    """The function that runs ``op``: ``backend``'s if given, else that of :func:`use_backend`, else the reference.

    Raises:
        ValueError: if the asked-for backend does not implement the op.
    """
    name = backend or _chosen.get() or "reference"
    table = _implementations[op]
    if name not in table:
        raise ValueError(f"op {op} has no backend {name}; available: {', '.join(sorted(table))}")
    return table[name]
