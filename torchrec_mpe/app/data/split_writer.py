"""Count a coded log's training values and write its rows, as ids, into one folder a split."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torchrec_mpe.app.data.arrays import ArrayWriter, array_writer
from torchrec_mpe.app.data.coded_log import Block, CodedLog
from torchrec_mpe.app.data.split import SPLITS
from torchrec_mpe.files.progress import progress_bar


def count_training_values(
    coded: CodedLog, splits: npt.NDArray[np.uint8], *, progress: bool
) -> list[npt.NDArray[np.int64]]:
    """Occurrences of each column's values in training rows: one int64 [size of the column's dictionary] a column."""
    counts = [np.zeros(dictionary.size, np.int64) for dictionary in coded.dictionaries]
    kinds = [column.kind for column in coded.log.columns]
    single = [index for index, kind in enumerate(kinds) if kind != "bag"]
    bags = [index for index, kind in enumerate(kinds) if kind == "bag"]
    with progress_bar(total=coded.rows, unit="row", unit_scale=True, desc="counting", disable=not progress) as bar:
        for block in coded.blocks():
            training = splits[block.rows] == 0
            codes = block.codes[training]
            for position, index in enumerate(single):
                np.add.at(counts[index], codes[:, position], 1)
            for index, (lengths, values) in zip(bags, block.bags, strict=True):
                np.add.at(counts[index], values[np.repeat(training, lengths)], 1)
            bar.update(training.size)
    return counts


class _SplitFiles:
    """The open files of one split."""

    def __init__(self, stack: ExitStack, folder: Path, singles: int, bags: list[int], dense: int) -> None:
        def create(name: str, dtype: npt.DTypeLike, row_shape: tuple[int, ...] = ()) -> ArrayWriter:
            return stack.enter_context(array_writer(folder / name, dtype, row_shape))

        folder.mkdir()
        self.labels = create("labels.npy", np.float32)
        self.ids = create("ids.npy", np.int32, (singles,))
        self.dense = create("dense.npy", np.float32, (dense,))
        self.values = [create(f"{field}.values.npy", np.int32) for field in bags]
        self.offsets = [create(f"{field}.offsets.npy", np.int64) for field in bags]
        for offsets in self.offsets:
            offsets.append(np.zeros(1, np.int64))

    def append_bag(
        self, bag: int, chosen: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]
    ) -> None:
        before = self.values[bag].rows
        self.values[bag].append(ids[np.repeat(chosen, lengths)])
        self.offsets[bag].append(before + np.cumsum(lengths[chosen], dtype=np.int64))


def write_splits(
    coded: CodedLog,
    folder: Path,
    splits: npt.NDArray[np.uint8],
    ids: dict[int, npt.NDArray[np.int32]],
    dense: list[int],
    *,
    progress: bool,
) -> None:
    """Write ``folder/<split>/*.npy``.

    Args:
        coded: the log, n rows.
        folder: an existing folder.
        splits: uint8 [n], index into ``SPLITS``.
        ids: for each column to keep, by its index in the log and in that order, the id of each code.
        dense: the number columns to keep as dense features, by their index among the number columns.
    """
    kinds = [column.kind for column in coded.log.columns]
    single = [index for index, kind in enumerate(kinds) if kind != "bag"]
    bags = [index for index, kind in enumerate(kinds) if kind == "bag"]
    kept_single = [(position, ids[index]) for position, index in enumerate(single) if index in ids]
    kept_bags = [(position, ids[index]) for position, index in enumerate(bags) if index in ids]
    bag_fields = [field for field, index in enumerate(ids) if kinds[index] == "bag"]

    def encode(block: Block) -> npt.NDArray[np.int32]:
        rows = np.empty((block.codes.shape[0], len(kept_single)), np.int32)
        for target, (position, column_ids) in enumerate(kept_single):
            rows[:, target] = column_ids[block.codes[:, position]]
        return rows

    with (
        ExitStack() as stack,
        progress_bar(total=coded.rows, unit="row", unit_scale=True, desc="writing", disable=not progress) as bar,
    ):
        files = [_SplitFiles(stack, folder / name, len(kept_single), bag_fields, len(dense)) for name in SPLITS]
        for block in coded.blocks():
            rows = encode(block)
            bag_ids = [column_ids[block.bags[position][1]] for position, column_ids in kept_bags]
            block_dense = block.dense[:, dense]
            for index, file in enumerate(files):
                chosen = splits[block.rows] == index
                file.labels.append(coded.labels[block.rows][chosen])
                file.ids.append(rows[chosen])
                file.dense.append(block_dense[chosen])
                for bag, (position, _) in enumerate(kept_bags):
                    file.append_bag(bag, chosen, block.bags[position][0], bag_ids[bag])
            bar.update(rows.shape[0])
