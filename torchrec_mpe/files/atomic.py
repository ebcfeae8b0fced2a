"""Files and folders that appear complete or not at all."""

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = ".unfinished-"
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # of the place, not of a path


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def hidden_folder(beside: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new hidden folder beside a path, whose folder is made if need be; removed with all that is left in it.

    What killed processes left of such folders of the same path is removed first: an owner holds a lock on its folder,
    which ends with the process. On file systems without locks nothing is removed.

    Raises:
        OSError: naming the path, if there is no space for it, or its storage fails.
    """
    target = Path(beside)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}{_UNFINISHED}*"):
        _remove_if_left(leftover)
    folder, lock = _make_locked(target)
    try:
        yield folder
    except Exception as error:
        code = _code(error)
        if code not in _STORAGE:
            raise
        # A failed write() names no path, and another error's path is hidden.
        raise OSError(code, os.strerror(code), os.fspath(target)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path on the same file system, renamed to ``path`` when the block ends without an exception.

    An existing file is replaced in one step; on an exception it is left as it was. The mode is the umask's.

    Raises:
        OSError: as of :func:`hidden_folder`.
    """
    target = Path(path)
    with hidden_folder(target) as folder:
        temporary = folder / target.name
        temporary.touch()
        yield temporary
        temporary.chmod(_mode_of_files(folder))
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden folder, renamed to ``path`` when the block ends without an exception. Modes are the umask's.

    Raises:
        FileExistsError: if ``path`` exists and is not an empty folder; checked before anything is written.
        OSError: as of :func:`hidden_folder`.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} already exists and is not an empty folder")
    with hidden_folder(target) as folder:
        temporary = folder / target.name
        temporary.mkdir()
        yield temporary
        for entry in temporary.rglob("*"):
            if not entry.is_dir():
                entry.chmod(_mode_of_files(folder))
            sync(entry)
        sync(temporary)
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
        sync(target.parent)


def _mode_of_files(folder: Path) -> int:
    """What the umask leaves of a new file's mode; safetensors writes files for their owner alone."""
    return stat.S_IMODE(folder.stat().st_mode) & 0o666


def _make_locked(target: Path) -> tuple[Path, int | None]:
    while True:
        folder = target.parent / f".{target.name}{_UNFINISHED}{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            return folder, _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # taken for a leftover before it was locked


def _lock(folder: Path) -> int | None:
    """Lock a folder; None where the file system has no locks.

    Raises:
        BlockingIOError: if another has locked it.
        FileNotFoundError: if it is not there any more.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError | FileNotFoundError):
            raise
        return None
    return descriptor


def _remove_if_left(folder: Path) -> None:
    try:
        lock = _lock(folder)
    except OSError:
        return  # in use, gone, or another user's
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _code(error: Exception) -> int:
    """The number of an error of the operating system; 0 of others."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # Libraries written in Rust and C++ say it in words alone.
    found = re.search(r"\((?:os error |errno )(\d+)\)|\[[Ee]rrno (\d+)\]", str(error))
    return int(found[1] or found[2]) if found else 0
