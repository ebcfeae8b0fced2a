"""polars' Categories, which polars calls unstable: numbers for texts that grow while a log streams by."""

import numpy as np
import numpy.typing as npt
import polars as pl


def new_categories() -> pl.Categorical:
    """A type whose series number their texts 0, 1, 2, ... in order of first appearance in any of them."""
    return pl.Categorical(pl.Categories.random())


def codes_of(texts: pl.Series) -> npt.NDArray[np.uint32]:
    """The number of each text, uint32 [n], of a series of such a type without nulls."""
    codes: npt.NDArray[np.uint32] = texts.to_physical().to_numpy()
    return codes
