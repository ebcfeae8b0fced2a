"""Numbers for texts, given out in order of first appearance while a log streams by."""

import numpy as np
import numpy.typing as npt
import polars as pl

from torchrec_mpe.upstream.polars import codes_of, new_categories


class ValueDictionary:
    """A growing dictionary text -> code, where codes are 0, 1, 2, ... in order of first appearance."""

    def __init__(self) -> None:
        self._type = new_categories()
        # One entry a code, in order; it also keeps polars from forgetting the categories.
        self._values = [pl.Series([], dtype=self._type)]
        self.size = 0

    def encode(self, texts: pl.Series) -> npt.NDArray[np.uint32]:
        """Codes of the texts, new ones included.

        Args:
            texts: String [n] without nulls.

        Returns:
            uint32 [n].
        """
        categories = texts.cast(self._type)
        codes = codes_of(categories)
        new = np.flatnonzero(codes >= self.size)
        if new.size:
            distinct, first = np.unique(codes[new], return_index=True)
            self.size += distinct.size
            if distinct[-1] != self.size - 1:
                raise RuntimeError("polars no longer numbers categories without gaps")
            self._values.append(categories.gather(new[first]))
        return codes

    def take_values(self) -> pl.Series:
        """String [size]: the text of each code. The dictionary gives up its memory and cannot be used afterwards."""
        values: pl.Series = pl.concat(self._values).cast(pl.String)
        self._values = []
        return values
