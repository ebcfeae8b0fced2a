"""Names of every backend that can run here, instruction sets of the CPU's apart, and running on one of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from torchrec_mpe.ops import library
from torchrec_mpe.ops.backends import use_backend

_CAPABILITIES = ("scalar", "avx2", "avx512")
CPU = [f"cpu-{name}" for name in _CAPABILITIES[: _CAPABILITIES.index(library.cpu_capability()) + 1]]
FAST = ["reference", *CPU]
ALL = [*FAST, "triton"]


@contextmanager
def on(backend: str) -> Iterator[None]:
    """Run ops on ``reference``, ``triton``, or the C++ kernels of an instruction set, such as ``cpu-avx2``."""
    name, _, capability = backend.partition("-")
    with use_backend(name):
        if capability:
            with library.use_cpu_capability(capability):
                yield
        else:
            yield
