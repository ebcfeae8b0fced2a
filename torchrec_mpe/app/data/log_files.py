"""The files that a log lies in, and what they are: found out from their first bytes, not from their names."""

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from torchrec_mpe.errors import UserError

_HEAD_BYTES = 1024
_COMPRESSIONS = (
    (rb"\x1f\x8b", "gzip"),
    (rb"\x28\xb5\x2f\xfd", "zstd"),
    (rb"BZh[1-9]1AY&SY", "bz2"),
    (rb"\x04\x22\x4d\x18", "lz4"),
)
_UNPACK = "unpack it first"
_AS_PARQUET = "write it as CSV or Parquet first"
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (rb"PK\x03\x04", "a zip file, or a spreadsheet in one", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z file", _UNPACK),
    (rb"\xfd7zXZ", "an xz file", _UNPACK),
    (rb"Rar!", "a rar file", _UNPACK),
    (rb".{257}ustar", "a tar file", _UNPACK),
    (rb"\xd0\xcf\x11\xe0", "an Excel file", _AS_PARQUET),
    (rb"ARROW1\0", "an Arrow file", _AS_PARQUET),
    (rb"ORC[^\x20-\x7e\t]", "an ORC file", _AS_PARQUET),
    (rb"Obj\x01", "an Avro file", _AS_PARQUET),
    (rb"\x89HDF", "an HDF5 file", _AS_PARQUET),
    (rb"SQLite format 3", "an SQLite database", _AS_PARQUET),
    (rb"\x93NUMPY", "a numpy array", _AS_PARQUET),
    (rb"\x80[\x02-\x05]", "a pickle", _AS_PARQUET),
    (rb"version https://git-lfs", "a git-lfs pointer and not the file itself", "fetch it with git lfs pull"),
    (rb"\s*(?i:<!doctype|<html|<\?xml)", "a web page or XML", "download the log itself"),
    (rb"\s*(\{|\[\s*[\[{])", "JSON", _AS_PARQUET),
)


def shown_paths(paths: Sequence[Path]) -> str:
    """The paths for a message: three at most."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(str, paths[:3])) + more


def log_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """The files that the paths name: files as they are, folders and patterns in the order of names, 9 before 10.

    Files of a folder whose names start with a dot or an underscore are passed over, as Spark does.

    Raises:
        UserError: if a path names no file.
    """
    files = tuple(file for path in paths for file in _files(path))
    if len(set(files)) < len(files):
        raise UserError(f"{shown_paths(paths)}: {max(files, key=files.count)} is named twice: name each file once")
    return files


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        if (path / "manifest.json").exists() and (path / "vocabulary").is_dir():
            raise UserError(f"{path} is prepared data: give it with --format prepared")
        found = [file for file in path.iterdir() if not file.name.startswith((".", "_"))]
        if folders := [file.name for file in found if file.is_dir()]:
            raise UserError(f"{path} holds the folder {folders[0]}: name the files, such as '{path}/*/*'")
        if not found:
            raise UserError(f"{path} is a folder without files: give the path of a log")
    elif path.exists():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)] if glob.has_magic(str(path)) else []
        if not found:
            raise UserError(f"{path} does not exist: give the path of a log")
        found = [file for file in found if not file.is_dir()]
    for file in found:
        if not file.is_file():
            raise UserError(f"{file} is a pipe or a device, and a log is read more than once: write it to a file first")
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty: give a log with at least one row")
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Orders names by their text, and the numbers in them by value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def compression(path: Path) -> str | None:
    """ "gzip", "zstd", "bz2", "lz4", or None."""
    with path.open("rb") as file:
        head = file.read(16)
    return next((name for magic, name in _COMPRESSIONS if re.match(magic, head)), None)


@contextmanager
def open_unpacked(path: Path) -> Iterator[tuple[Any, Any]]:
    """The file's uncompressed bytes and its own, two of pyarrow's streams."""
    kind = compression(path)
    with pa.OSFile(str(path), "rb") as file:
        yield (pa.CompressedInputStream(file, kind) if kind else file), file


def content(path: Path) -> Literal["text", "parquet"]:
    """What a file is.

    Raises:
        UserError: if it is what no log can be, with the name of its format.
    """
    with open_unpacked(path) as (stream, _):
        try:
            head = bytes(stream.read(_HEAD_BYTES))
        except OSError:
            return "text"  # whoever reads it all finds the line where it is damaged
    if re.match(rb"PAR1[^\x20-\x7e\t\n]", head):
        if compression(path):
            raise UserError(f"{path} is a Parquet file in a {compression(path)} file: {_UNPACK}")
        return "parquet"
    for magic, name, advice in _FOREIGN:
        if re.match(magic, head, re.DOTALL):
            raise UserError(f"{path} is {name}, which is not read: {advice}")
    zeros = [head[start::2].count(0) for start in (0, 1)]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (max(zeros) > len(head) // 8 and min(zeros) == 0):
        raise UserError(f"{path} is UTF-16 text: convert it with iconv -f UTF-16 -t UTF-8")
    if sum(byte < 32 and byte not in b"\t\n\r\f" for byte in head) > len(head) // 20:
        raise UserError(f"{path} is binary data of a format that is not known: {_AS_PARQUET}")
    return "text"
