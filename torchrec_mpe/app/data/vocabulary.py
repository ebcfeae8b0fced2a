"""Ids for a field's values: a value's place in the order of frequency among the training rows."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from torchrec_mpe.app.data.hashing import stable_hash


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one field: id i is the i-th most frequent value, so ``counts`` never rises.

    ``ids`` is int32 [number of codes], the id of each code of the field's dictionary. ``table`` has one row an id, in
    order: ``value`` (String; null for the shared id) and ``count`` (Int64), the occurrences in training rows.
    """

    ids: npt.NDArray[np.int32]
    table: pl.DataFrame
    shared_id: int

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.table.height


def build_vocabulary(values: pl.Series, counts: npt.NDArray[np.int64], min_count: int) -> Vocabulary:
    """Give ids to a field's values.

    Values seen fewer than ``min_count`` times in training rows, and those never seen, share one id, which is ordered by
    the sum of their counts like any other. Equal counts are ordered by a fixed hash of the value, the shared id last.

    Args:
        values: String [n], distinct.
        counts: int64 [n], occurrences of each value in training rows.
        min_count: at least 1.
    """
    kept = np.flatnonzero(counts >= min_count)
    kept_values = values.gather(kept)
    order = np.lexsort((stable_hash(kept_values), -counts[kept]))
    ordered_codes = kept[order]
    ordered_counts = counts[ordered_codes]
    shared_count = int(counts.sum() - ordered_counts.sum())
    shared_id = int(np.searchsorted(-ordered_counts, -shared_count, side="right"))

    ids = np.full(len(values), shared_id, np.int32)
    places = np.arange(ordered_codes.size, dtype=np.int32)
    ids[ordered_codes] = places + (places >= shared_id)
    ordered = kept_values.gather(order)
    table = pl.DataFrame(
        {
            "value": pl.concat([ordered[:shared_id], pl.Series([None], dtype=pl.String), ordered[shared_id:]]),
            "count": np.insert(ordered_counts, shared_id, shared_count),
        },
        schema={"value": pl.String, "count": pl.Int64},
    )
    return Vocabulary(ids, table, shared_id)
