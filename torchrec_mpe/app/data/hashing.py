"""A hash of texts that is the same on every machine and with every version of every library."""

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import torch

from torchrec_mpe.precision.row_initialization import splitmix64

_WORD = 8
_SEED = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    return splitmix64(torch.from_numpy(x.view(np.int64))).numpy().view(np.uint64)


def stable_hash(values: pl.Series) -> npt.NDArray[np.uint64]:
    """64-bit hash of the UTF-8 bytes of each text, without sign of order or frequency.

    The bytes are taken as little-endian words of 8, the last one padded with zeros; the hash starts as
    mix(seed + length) and becomes mix(hash ^ word) for each word, with splitmix64's finalizer as mix.

    Args:
        values: String [n] without nulls.

    Returns:
        uint64 [n].
    """
    array = values.to_arrow().cast(pa.large_string())
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    size = len(array)
    _, offset_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offset_buffer, "<i8", count=size + 1 + array.offset)[array.offset :] if size else None
    if offsets is None:
        return np.zeros(0, np.uint64)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    padded = np.concatenate([data, np.zeros(_WORD, np.uint8)])
    words = np.ndarray(
        (padded.size - _WORD + 1,), "<u8", padded, strides=(1,)
    )  # the word at every byte, aligned or not

    starts, lengths = offsets[:-1], np.diff(offsets)
    result = _mix(_SEED + lengths.astype(np.uint64))
    for begin in range(0, int(lengths.max()), _WORD):
        rows = slice(None) if int(lengths.min()) > begin else np.flatnonzero(lengths > begin)
        left = np.minimum(lengths[rows] - begin, _WORD).astype(np.uint64)
        mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> (np.uint64(64) - np.uint64(8) * left)
        result[rows] = _mix(result[rows] ^ (words[starts[rows] + begin] & mask))
    return result
