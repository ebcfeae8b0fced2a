"""Files and folders appear whole or not at all."""

import errno
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from torchrec_mpe.files.atomic import atomic_directory, atomic_file, hidden_folder


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    with atomic_file(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "one" and [p.name for p in target.parent.iterdir()] == ["file"]
    with atomic_file(target) as temporary:
        temporary.write_text("two")
    assert target.read_text() == "two"


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as temporary:
        (temporary / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    target.mkdir()  # an empty folder may be in the way
    with atomic_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").touch(mode=0o600)
        assert not any(target.iterdir())
    assert (target / "sub" / "file").read_text() == "" and [p.name for p in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(FileExistsError, match="not an empty folder"), atomic_directory(target):
        pass


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0o002, 0o775, 0o664)])  # fmt: skip  # noqa: E501
def test_modes_are_the_umask_s(umask: int, folder: int, file: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "folder") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "file").touch(mode=0o600)  # as safetensors does
        with atomic_file(tmp_path / "file") as temporary:
            temporary.unlink()
            temporary.touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("folder", "folder/sub", "folder/sub/file", "file")}  # fmt: skip  # noqa: E501
    assert modes == {"folder": folder, "folder/sub": folder, "folder/sub/file": file, "file": file}


def _start_and_be_killed(write: Callable[[Path], AbstractContextManager[Path]], target: Path) -> None:
    child = os.fork()
    if child == 0:
        with write(target):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("write", [atomic_directory, atomic_file])
def test_what_a_killed_process_left_is_removed_by_the_next(
    write: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    (tmp_path / ".out.mine").mkdir()
    _start_and_be_killed(write, tmp_path / "out[1]")
    _start_and_be_killed(write, tmp_path / "other")
    assert len(list(tmp_path.iterdir())) == 3
    with hidden_folder(tmp_path / "out[1]") as alive:
        with write(tmp_path / "out[1]"):
            assert len(list(tmp_path.glob(".out?1?.unfinished-*"))) == 2
        assert alive.is_dir(), "its owner is alive"
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left[0].startswith(".other.unfinished-") and left[1:] == [".out.mine", "out[1]"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENOSPC, "No space left on device", "/hidden"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_with_the_path(error: Exception, tmp_path: Path) -> None:
    for write in (atomic_directory, atomic_file):
        with pytest.raises(OSError, match="No space left on device") as told, write(tmp_path / "out"):
            raise error
        assert told.value.filename == str(tmp_path / "out") and told.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="theirs"), atomic_file(tmp_path / "out"):
        (tmp_path / "theirs").read_text()
