"""The loss of every step, as a file of JSON lines."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.errors import UserError


class StepLog:
    """Appends one JSON object a training step, and one an evaluation, to a file.

    Losses stay on their device until ``every`` steps are together, because reading one waits for the GPU. A job that
    resumed has the steps since its checkpoint twice, told apart by ``restart``.

    Args:
        every (int): steps between writes.
        restart (int): how often the job was started again before.

    Example of the lines::

        {"phase": "search", "step": 1, "loss": 0.6931471824645996, "restart": 0}
        {"phase": "search", "step": 1, "validation_auc": 0.5, "restart": 0}
    """

    def __init__(self, every: int, restart: int = 0) -> None:
        self._path: Path | None = None
        self._every = every
        self._restart = restart
        self._steps: list[tuple[str, int]] = []
        self._losses: list[Tensor] = []
        self._last: tuple[str, int] | None = None

    def write_to(self, path: str | os.PathLike[str] | None) -> None:
        """Write to a file in an existing folder from now on; None writes nothing, on all ranks but one."""
        self.flush()
        self._path = None if path is None else Path(path)

    @property
    def place(self) -> str:
        """Where training is, for messages."""
        return "before the first step" if self._last is None else f"after step {self._last[1]} of {self._last[0]}"

    def add(self, phase: str, step: int, loss: Tensor) -> None:
        """Take up the loss, a detached scalar, of one step.

        Raises:
            UserError: if a loss since the last write is not finite.
        """
        self._last = (phase, step)
        self._steps.append(self._last)
        self._losses.append(loss)
        if len(self._steps) >= self._every:
            self.flush()

    def evaluation(self, phase: str, step: int, auc: float) -> None:
        """Write the validation AUC after a step."""
        self.flush()
        self._write([{"phase": phase, "step": step, "validation_auc": auc if math.isfinite(auc) else None}])

    def flush(self) -> None:
        """Write what is pending; raises as :meth:`add` does, after writing."""
        if not self._steps:
            return
        losses = torch.stack(self._losses).tolist()
        lines = [
            {"phase": phase, "step": step, "loss": loss}
            for (phase, step), loss in zip(self._steps, losses, strict=True)
        ]
        self._steps, self._losses = [], []
        self._write(lines)
        for line in lines:
            if not math.isfinite(line["loss"]):
                raise UserError(f"the loss is not finite at step {line['step']} of {line['phase']}: training diverged")

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self._path is None:
            return
        text = "".join(json.dumps({**line, "restart": self._restart}) + "\n" for line in lines)
        with self._path.open("a+b") as file:
            # What was killed in the middle of a line must not swallow the next one.
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                text = "\n" + text
            file.write(text.encode())
