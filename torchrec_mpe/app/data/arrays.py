"""Arrays on disk: appended to while they are made, then read in blocks or memory-mapped."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt


class ArrayWriter:
    """Appends rows to a .npy file whose row count is known only at the end.

    The bytes go through ``write`` and never through a memory map, so that a full disk is an ``OSError`` and not a
    killed process.
    """

    def __init__(self, file: BinaryIO, dtype: npt.DTypeLike, row_shape: tuple[int, ...]) -> None:
        self._file = file
        self._dtype = np.dtype(dtype)
        self._row_shape = row_shape
        self.rows = 0
        self._write_header()
        self._header_bytes = file.tell()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.rows, *self._row_shape)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Append rows, [n, *row_shape], converted to the file's type."""
        if rows.shape[1:] != self._row_shape:
            raise ValueError(f"rows of shape {rows.shape[1:]} cannot follow rows of shape {self._row_shape}")
        self.rows += rows.shape[0]
        if rows.size:
            self._file.write(np.ascontiguousarray(rows, self._dtype).reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """Write the final row count into the header, which numpy pads so that it keeps its length."""
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._header_bytes:
            raise RuntimeError("numpy changed the length of the array's header")


@contextmanager
def array_writer(path: Path, dtype: npt.DTypeLike, row_shape: tuple[int, ...] = ()) -> Iterator[ArrayWriter]:
    """Create the .npy file ``path`` of shape [rows appended, *row_shape]."""
    with path.open("wb") as file:
        writer = ArrayWriter(file, dtype, row_shape)
        yield writer
        writer.finish()


class ArrayReader:
    """Reads the rows of a .npy file from front to back, without holding more than it is asked for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        np.lib.format.read_magic(file)
        shape, _, self._dtype = np.lib.format.read_array_header_1_0(file)
        self.rows: int = shape[0]
        self._row_shape: tuple[int, ...] = shape[1:]

    def read(self, rows: int) -> npt.NDArray[Any]:
        """The next ``rows`` rows, [rows, *row_shape]; fewer at the end of the file."""
        bytes_a_row = int(np.prod(self._row_shape, dtype=np.int64)) * self._dtype.itemsize
        if bytes_a_row == 0:
            return np.zeros((rows, *self._row_shape), self._dtype)
        data = self._file.read(rows * bytes_a_row)
        return np.frombuffer(data, self._dtype).reshape(-1, *self._row_shape)


@contextmanager
def array_reader(path: Path) -> Iterator[ArrayReader]:
    """Open the .npy file ``path`` for reading from front to back."""
    with path.open("rb") as file:
        yield ArrayReader(file)


def map_array(path: Path) -> npt.NDArray[Any]:
    """The array of a .npy file, memory-mapped and read-only.

    Raises:
        ValueError: if the file is cut short or no .npy file.
    """
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except ValueError:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
        if array.size:
            raise
        return array  # some numpy versions cannot map an array without elements
