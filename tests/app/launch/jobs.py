"""Jobs of two ranks under torchelastic, whose ranks a test kills or stops by process id."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_VARIABLES = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2", "PYTHONUNBUFFERED": "1"}
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
    "--rdzv-endpoint", "localhost:0",
]  # fmt: skip


class RunningJob:
    """A job started from a command line in a folder, with output in ``<name>.log``.

    On leaving the block none of its processes is left.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, name: str, variables: Mapping[str, str] | None = None
    ) -> None:
        self.output = folder / f"{name}.log"
        self._file = self.output.open("wb")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_VARIABLES, "PATH": path, **(variables or {})},
            start_new_session=True,
        )

    def __enter__(self) -> "RunningJob":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:  # fmt: skip  # noqa: E501
        # The launcher first, so that it starts no rank anew.
        for pid in [self._process.pid, *_descendants(self._process.pid), *(p for s in self.pids() for p in s.values())]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._file.close()

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def pids(self) -> list[dict[int, int]]:
        """Process ids by rank of each start of the ranks."""
        starts: dict[int, dict[int, int]] = {}
        for rank, pid, restart in re.findall(r"rank (\d+) of 2 on \S+: process (\d+), \S+, restart (\d+)", self.text):
            starts.setdefault(int(restart), {})[int(rank)] = int(pid)
        return [starts[restart] for restart in sorted(starts)]

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, f"the job has ended with {self._process.poll()}:\n{self.text}"
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{self.text}"
            time.sleep(0.002)

    def end(self, seconds: float) -> int:
        """The exit code, when the job has ended by itself."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None


def _descendants(pid: int) -> list[int]:
    """Ids of the processes that a process has started, and those that these have."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


def alive(pid: int) -> bool:
    """Whether a process runs or is stopped; a zombie that nobody has waited for does not count."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def steps(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a step log."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
