"""The folder of a run's checkpoints: names, what appears when, and what is removed when."""

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from torchrec_mpe.distributed.checkpoint.checkpoint import MANIFEST, Checkpoint, read_checkpoint
from torchrec_mpe.files.atomic import sync
from torchrec_mpe.files.digest import file_sha256
from torchrec_mpe.upstream.checkpoint import DIGEST_SUFFIX

_NAME = re.compile(r"(\d{8})-[a-z]+-step-\d+")
_UNFINISHED = ".unfinished-"  # being written or removed: never looked at, and taken away by the next save


class CheckpointFolder:
    """Complete checkpoints in folders ``<number>-<phase>-step-<step>``, and beside them what several of them share.

    A checkpoint is written under a hidden name and renamed when it is complete, so that a name that can be seen is a
    checkpoint that can be loaded, whenever a process was killed. The number counts the saves: the newest checkpoint is
    the one saved last, also when a run went back to an earlier step.

    Args:
        path (Path): on a file system that all ranks see; made if it is not there.
        keep (int): complete checkpoints to keep.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._keep = keep

    def complete(self) -> list[Checkpoint]:
        """All checkpoints that can be loaded, oldest first; warns of damaged ones, which it passes over."""
        found: list[Checkpoint] = []
        for name in self._names():
            try:
                found.append(read_checkpoint(self.path / name))
            except (ValueError, OSError) as error:
                warnings.warn(f"passed over: {error}", RuntimeWarning, stacklevel=2)
        return found

    def begin(self, phase: str, step: int) -> tuple[Path, Path]:
        """Clear away what killed saves left, and name the next checkpoint.

        Returns:
            Tuple[Path, Path]: an empty folder to write to, and the name that :meth:`publish` gives it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
        # Damaged ones too: two folders must not get one name.
        taken = [int(entry.name.split("-", 1)[0]) for entry in self.path.iterdir() if _NAME.fullmatch(entry.name)]
        number = 1 + max(taken, default=0)
        target = self.path / f"{number:08d}-{phase}-step-{step}"
        temporary = self.path / f"{_UNFINISHED}{target.name}"
        temporary.mkdir()
        return temporary, target

    def take_digests(self, temporary: Path) -> dict[str, str]:
        """SHA-256 of every file that the ranks wrote, by name; of those with tensors as they noted it while writing."""
        digests: dict[str, str] = {}
        noted = {file.name: file for file in temporary.glob(f"*{DIGEST_SUFFIX}")}
        for file in sorted(temporary.iterdir()):
            if file.name in noted:
                continue
            beside = noted.get(f"{file.name}{DIGEST_SUFFIX}")
            digests[file.name] = file_sha256(file) if beside is None else beside.read_text()
        for file in noted.values():
            file.unlink()
        return digests

    def publish(self, temporary: Path, target: Path) -> None:
        """Make a fully written checkpoint one that can be found, then remove those that are too old."""
        sync(temporary / MANIFEST)  # the ranks' own files are synced by their writers
        sync(temporary)
        temporary.rename(target)
        sync(self.path)
        names = self._names()
        for name in names[: -self._keep]:
            self._remove(self.path / name)
        self._remove_unshared(names[-self._keep :])

    def share(self, kind: str, file: str, write: Callable[[Path], None]) -> str:
        """Store content once, however many checkpoints refer to it.

        Args:
            kind (str): "counts" or "plan".
            file (str): name of the file that ``write`` is to write; its digest names the content.
            write (Callable[[Path], None]): writes to a path whose folder is its own.

        Returns:
            str: name of the folder beside the checkpoints that holds the content.
        """
        temporary = self.path / f"{_UNFINISHED}{kind}-{secrets.token_hex(4)}"
        temporary.mkdir()
        write(temporary / file)
        target = self.path / f"{kind}-{file_sha256(temporary / file)[:16]}"
        if target.is_dir():
            shutil.rmtree(temporary)
            return target.name
        for entry in temporary.iterdir():
            sync(entry)
        sync(temporary)
        temporary.rename(target)
        sync(self.path)
        return target.name

    def discard(self, temporary: Path) -> None:
        """Remove what a failed save wrote."""
        shutil.rmtree(temporary, ignore_errors=True)

    def _names(self) -> list[str]:
        if not self.path.is_dir():
            return []
        return sorted(e.name for e in self.path.iterdir() if _NAME.fullmatch(e.name) and (e / MANIFEST).is_file())

    def _remove_unshared(self, kept: list[str]) -> None:
        used: set[str | None] = set()
        for name in kept:
            try:
                manifest = read_checkpoint(self.path / name).manifest
            except (ValueError, OSError):
                return  # what a damaged checkpoint refers to is not known
            used |= {manifest["counts"], manifest["plan"]}
        for kind in ("counts", "plan"):
            for entry in self.path.glob(f"{kind}-*"):
                if entry.name not in used:
                    self._remove(entry)

    def _remove(self, path: Path) -> None:
        """Out of sight in one step first: a kill in between must not leave half of it under its name."""
        hidden = path.with_name(f"{_UNFINISHED}{path.name}")
        os.replace(path, hidden)
        shutil.rmtree(hidden)
