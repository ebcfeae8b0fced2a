"""Which rows train, validate and test: 8:1:1, at random or by time."""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from torchrec_mpe.errors import UserError

SplitKind = Literal["random", "chronological"]
SPLITS = ("train", "validation", "test")


def check_split(kind: str, seed: int, time: str | None) -> None:
    """Raise a UserError unless the split's options are possible and fit together."""
    if kind not in get_args(SplitKind):
        raise UserError(f"split {kind!r} is unknown: use 'random' or 'chronological'")
    if seed < 0:
        raise UserError(f"seed {seed} is negative: use 0 or more")
    if time is not None and kind != "chronological":
        raise UserError(f"time column {time!r} has no use in a random split: use split 'chronological'")


def assign_splits(
    kind: SplitKind, rows: int, seed: int, times: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.uint8]:
    """Index into ``SPLITS`` of each row, uint8 [rows].

    Random: row i goes by the i-th number of the Philox generator with ``seed``, whatever the size of the batches that
    are read. Chronological: the first 8 tenths of the rows train, then 1 tenth validates and 1 tenth tests; in file
    order, or by ``times`` (float64 [rows]), where rows of equal time stay together.
    """
    if kind == "random":
        drawn = np.random.Generator(np.random.Philox(seed)).random(rows)
        return (drawn >= 0.8).astype(np.uint8) + (drawn >= 0.9).astype(np.uint8)
    validation, test = rows * 8 // 10, rows * 9 // 10
    if times is None:
        order: npt.NDArray[np.int64] | npt.NDArray[np.float64] = np.arange(rows)
        bounds = (validation, test)
    else:
        order = times
        ordered = np.partition(times, [validation, test])
        bounds = (ordered[validation], ordered[test])
    return (order >= bounds[0]).astype(np.uint8) + (order >= bounds[1]).astype(np.uint8)
