"""A made-up log in Criteo's format with a long tail of ids, useful and useless fields, and a known best AUC."""

import os

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from torchrec_mpe.app.data.log import CRITEO_CATEGORIES, CRITEO_NUMBERS
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.files.progress import progress_bar

# Fields in pairs of equal size, the first useful and the second useless: (possible ids, Zipf exponent). The useful
# ones' effects on the logit have the standard deviation of _EFFECTS, over rows.
_SIZES = ((80_000, 1.0), (32_000, 1.0), (14_000, 1.0), (5_000, 1.05), (500, 1.05), (40, 1.0))
_EFFECTS = (0.68, 0.63, 0.58, 0.56, 0.52, 0.48)
_TAIL_EFFECT = 0.15  # size of the rarest ids' effects against the most frequent ids'
_INTERACTIONS = ((0, 3), (1, 4), (2, 5))  # pairs of useful fields
_INTERACTION_EFFECT = 0.3
_LATENT = 4
_BIAS = -1.15
_BLOCK_ROWS = 50_000

Floats = npt.NDArray[np.float64]


class SyntheticModel:
    """The distribution behind the log: 12 fields of Zipf-distributed ids, of which fields 0, 2, 4, ... matter.

    A useful id's effect on the logit is normal, with a deviation that falls in the order of frequency, down to
    ``_TAIL_EFFECT`` of its start; a few pairs of useful fields interact through the inner product of latent vectors.
    Useless fields are drawn independently of the label.
    """

    def __init__(self, seed: int) -> None:
        random = np.random.Generator(np.random.Philox(seed))
        self._cumulative: list[Floats] = []
        self._effects: list[Floats] = []
        self._latent: list[Floats] = []
        for (ids, exponent), deviation in zip(_SIZES, _EFFECTS, strict=True):
            frequency = np.arange(1.0, ids + 1) ** -exponent
            frequency /= frequency.sum()
            scale = _TAIL_EFFECT + (1 - _TAIL_EFFECT) * (frequency / frequency[0]) ** 0.35
            self._cumulative.append(np.cumsum(frequency))
            self._effects.append(_standardized(scale * random.standard_normal(ids), frequency) * deviation)
            latent = scale[:, None] * random.standard_normal((ids, _LATENT))
            self._latent.append(np.stack([_standardized(column, frequency) for column in latent.T], 1))

    @property
    def fields(self) -> int:
        """Number of fields."""
        return 2 * len(_SIZES)

    def draw(self, random: np.random.Generator, rows: int) -> npt.NDArray[np.int64]:
        """Ids int64 [rows, fields], 0 being a field's most frequent id."""
        uniform = random.random((rows, self.fields))
        ids = np.empty((rows, self.fields), np.int64)
        for field in range(self.fields):
            cumulative = self._cumulative[field // 2]
            found = np.searchsorted(cumulative, uniform[:, field], side="right")
            ids[:, field] = np.minimum(found, cumulative.size - 1)
        return ids

    def logits(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Log-odds float64 [rows] of a positive label, given ids int64 [rows, fields]."""
        useful = ids[:, ::2]
        total = np.full(ids.shape[0], _BIAS)
        for field, effects in enumerate(self._effects):
            total += effects[useful[:, field]]
        for left, right in _INTERACTIONS:
            product = self._latent[left][useful[:, left]] * self._latent[right][useful[:, right]]
            total += _INTERACTION_EFFECT / np.sqrt(_LATENT) * product.sum(1)
        return total


def _standardized(values: Floats, frequency: Floats) -> Floats:
    """Values of mean 0 and deviation 1 under the frequencies, so that no seed gets an easier log than another."""
    centred = values - frequency @ values
    result: Floats = centred / np.sqrt(frequency @ centred**2)
    return result


def _texts(ids: npt.NDArray[np.int64], field: int) -> pl.Series:
    """Eight hexadecimal digits an id: the id times an odd number modulo 2**32, so that different ids stay different."""
    scrambled = (ids.astype(np.uint64) * np.uint64(2654435761) + np.uint64(field * 40503)) & np.uint64(0xFFFFFFFF)
    digits = scrambled.astype(">u4").tobytes().hex().encode()
    offsets = np.arange(0, 8 * ids.size + 1, 8, dtype=np.int32)
    return pl.Series(pa.StringArray.from_buffers(ids.size, pa.py_buffer(offsets), pa.py_buffer(digits)))


def write_synthetic_log(
    path: str | os.PathLike[str], *, rows: int = 300_000, seed: int = 0, progress: bool = True
) -> None:
    """Write a made-up log in Criteo's format; the same rows and seed give the same bytes.

    12 of the 26 categories hold ids with a long tail (about 175,000 different ones in 300,000 rows); the other
    categories and the 13 numbers are empty, so that preparing leaves them out. C1, C3, ... C11 tell about the label,
    the frequent ids more than the rare ones; C2, C4, ... C12 do not. About 3 in 10 labels are 1, and knowing the
    distribution itself gives an AUC of about 0.81.

    Args:
        path: the file to write; it appears complete or not at all.
        rows: at least 1.
        seed: at least 0.
        progress: whether to show a progress bar.

    Raises:
        UserError: if rows or seed are out of range.
        OSError: if the disk is full or cannot be written; nothing is left behind.
    """
    if rows < 1 or seed < 0:
        raise UserError(f"rows is {rows} and seed is {seed}: give at least 1 row and a seed of 0 or more")
    model = SyntheticModel(seed)
    random = np.random.Generator(np.random.Philox(seed).jumped())
    empty = {name: pl.lit("") for name in CRITEO_NUMBERS + CRITEO_CATEGORIES}
    with (
        atomic_file(path) as temporary,
        temporary.open("wb") as file,
        progress_bar(total=rows, unit="row", unit_scale=True, desc="making up a log", disable=not progress) as bar,
    ):
        for start in range(0, rows, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, rows - start)
            ids = model.draw(random, count)
            positive = random.random(count) < 1 / (1 + np.exp(-model.logits(ids)))
            texts = {CRITEO_CATEGORIES[field]: _texts(ids[:, field], field) for field in range(model.fields)}
            frame = pl.DataFrame({"label": positive.astype(np.int8)}).with_columns(**(empty | texts))
            file.write(frame.write_csv(separator="\t", include_header=False, quote_style="never").encode())
            bar.update(count)
