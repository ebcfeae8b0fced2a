"""A log read once and kept on disk as numbers, so that its text need not be parsed again."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from torchrec_mpe.app.data.arrays import array_reader, array_writer
from torchrec_mpe.app.data.dictionary import ValueDictionary
from torchrec_mpe.app.data.log import Log
from torchrec_mpe.app.data.parse import parse_batch
from torchrec_mpe.app.data.reader import read_text

BLOCK_ROWS = 1 << 16
"""Rows read back at a time."""


@dataclass(frozen=True)
class Block:
    """m consecutive rows of a coded log, the first of which is row ``start``.

    ``codes`` is uint32 [m, single-valued columns]; ``dense`` is float32 [m, number columns]; ``bags`` has for each
    column of bags (lengths int32 [m], codes uint32 [sum of lengths]).
    """

    start: int
    codes: npt.NDArray[np.uint32]
    dense: npt.NDArray[np.float32]
    bags: tuple[tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32]], ...]

    @property
    def rows(self) -> slice:
        """Where the block's rows lie among all rows."""
        return slice(self.start, self.start + self.codes.shape[0])


@dataclass(frozen=True)
class CodedLog:
    """A whole log of n rows; what grows with n lies in ``folder``, but for 1 byte a row (9 with times).

    ``labels`` is bool [n]; ``times`` is float64 [n] or None; ``dictionaries`` has one entry a column of the log;
    ``dense_bounds`` is float32 [number columns, 2], the lowest and highest dense value; ``bag_bounds`` is int64
    [columns of bags, 2], the lowest and highest bag length.
    """

    log: Log
    folder: Path
    labels: npt.NDArray[np.bool_]
    times: npt.NDArray[np.float64] | None
    dictionaries: tuple[ValueDictionary, ...]
    dense_bounds: npt.NDArray[np.float32]
    bag_bounds: npt.NDArray[np.int64]

    @property
    def rows(self) -> int:
        """Number of rows n."""
        return self.labels.size

    def constant(self, column: int) -> str | None:
        """Why the column of that index cannot tell one row from another, or None if it can."""
        size = self.dictionaries[column].size
        if self.log.columns[column].kind != "bag":
            return "holds one single value in the whole file" if size == 1 else None
        bag = sum(other.kind == "bag" for other in self.log.columns[:column])
        if size == 0:
            return "is empty in the whole file"
        alike = size == 1 and self.bag_bounds[bag, 0] == self.bag_bounds[bag, 1]
        return "holds one single bag in the whole file" if alike else None

    def blocks(self) -> Iterator[Block]:
        """Read the rows back in order, ``BLOCK_ROWS`` at a time."""
        bags = sum(column.kind == "bag" for column in self.log.columns)
        with ExitStack() as stack:
            codes = stack.enter_context(array_reader(self.folder / "codes.npy"))
            dense = stack.enter_context(array_reader(self.folder / "dense.npy"))
            lengths = [stack.enter_context(array_reader(self.folder / f"{bag}.lengths.npy")) for bag in range(bags)]
            values = [stack.enter_context(array_reader(self.folder / f"{bag}.codes.npy")) for bag in range(bags)]
            for start in range(0, self.rows, BLOCK_ROWS):
                rows = min(BLOCK_ROWS, self.rows - start)
                block_lengths = [file.read(rows) for file in lengths]
                block_bags = tuple(
                    (length, file.read(int(length.sum()))) for length, file in zip(block_lengths, values, strict=True)
                )
                yield Block(start, codes.read(rows), dense.read(rows), block_bags)


def _bounds(bounds: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Bounds [k, 2] widened to hold the columns of ``values`` [m, k]."""
    return np.stack([np.minimum(bounds[:, 0], values.min(0)), np.maximum(bounds[:, 1], values.max(0))], 1)


def code_log(log: Log, folder: Path, *, progress: bool) -> CodedLog:
    """Read the log once and write it as codes into the new folder ``folder``.

    Raises:
        UserError: if the log cannot be read or a cell is not what it should be.
    """
    folder.mkdir()
    dictionaries = tuple(ValueDictionary() for _ in log.columns)
    single = [index for index, column in enumerate(log.columns) if column.kind != "bag"]
    bags = [index for index, column in enumerate(log.columns) if column.kind == "bag"]
    labels: list[npt.NDArray[np.bool_]] = []
    times: list[npt.NDArray[np.float64]] = []
    dense_bounds = np.tile(np.array([np.inf, -np.inf], np.float32), (len(log.numbers), 1))
    bag_bounds = np.tile(np.array([np.inf, -np.inf]), (len(bags), 1))
    rows = 0
    with ExitStack() as stack:
        # Each dictionary is used by one thread at a time, batch after batch, so that codes do not depend on timing.
        pool = stack.enter_context(ThreadPoolExecutor())
        code_file = stack.enter_context(array_writer(folder / "codes.npy", np.uint32, (len(single),)))
        dense_file = stack.enter_context(array_writer(folder / "dense.npy", np.float32, (len(log.numbers),)))
        length_files = [
            stack.enter_context(array_writer(folder / f"{bag}.lengths.npy", np.int32)) for bag in range(len(bags))
        ]
        bag_files = [
            stack.enter_context(array_writer(folder / f"{bag}.codes.npy", np.uint32)) for bag in range(len(bags))
        ]

        def encode(index: int, texts: pl.Series) -> npt.NDArray[np.uint32]:
            return dictionaries[index].encode(texts)

        for text in read_text(log, progress=progress):
            batch = parse_batch(log, text, rows)
            rows += text.height
            labels.append(batch.labels)
            if batch.times is not None:
                times.append(batch.times)
            columns = batch.categories.get_columns()
            codes = np.empty((text.height, len(single)), np.uint32)
            for position, column in enumerate(pool.map(encode, single, [columns[index] for index in single])):
                codes[:, position] = column
            code_file.append(codes)
            dense_file.append(batch.dense)
            dense_bounds = _bounds(dense_bounds, batch.dense)
            lengths = [columns[index].list.len().to_numpy().astype(np.int32) for index in bags]
            flat = [columns[index].explode().drop_nulls() for index in bags]
            for bag, column in enumerate(pool.map(encode, bags, flat)):
                length_files[bag].append(lengths[bag])
                bag_files[bag].append(column)
            if bags:
                bag_bounds = _bounds(bag_bounds, np.stack(lengths, 1))
    return CodedLog(
        log=log,
        folder=folder,
        labels=np.concatenate(labels),
        times=np.concatenate(times) if times else None,
        dictionaries=dictionaries,
        dense_bounds=dense_bounds,
        bag_bounds=bag_bounds.astype(np.int64),
    )
