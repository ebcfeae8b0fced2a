"""How often each row is looked up."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrec_mpe.ops import library
from torchrec_mpe.ops.backends import implementation, register
from torchrec_mpe.ops.reference import count_ids as reference


def count_ids_(
    counts: Tensor,
    ids: Tensor,
    ids_per_feature: Sequence[int],
    first_row: Sequence[int],
    num_rows: Sequence[int],
    *,
    backend: str | None = None,
) -> None:
    """Add to each row's count the lookups of a batch, in place.

    Args:
        counts (Tensor): int64 [rows of all tables], contiguous.
        ids (Tensor): int32 or int64 [N], feature after feature; an id outside its table is not counted.
        ids_per_feature (Sequence[int]): F numbers, their sum is N.
        first_row (Sequence[int]): F numbers, where the feature's table (or shard of it) starts in ``counts``.
        num_rows (Sequence[int]): F numbers, rows of the feature's table or shard.
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Raises:
        TypeError: if counts are not int64.
        ValueError: if the features do not fit the ids, or a table's rows do not fit the counts.

    Example::

        counts = torch.zeros(5, dtype=torch.int64)
        count_ids_(counts, torch.tensor([0, 1, 1, 0]), [3, 1], [0, 2], [2, 3])   # [1, 2, 1, 0, 0]
    """
    if counts.dtype != torch.int64:
        raise TypeError(f"counts must be int64, got {counts.dtype}")
    if not len(ids_per_feature) == len(first_row) == len(num_rows) or sum(ids_per_feature) != len(ids):
        raise ValueError(
            f"{len(ids)} ids do not fit {sum(ids_per_feature)} ids of {len(ids_per_feature)} features with "
            f"{len(first_row)} first rows and {len(num_rows)} numbers of rows"
        )
    for f, (number, first, rows) in enumerate(zip(ids_per_feature, first_row, num_rows, strict=True)):
        if number < 0 or first < 0 or rows < 0 or first + rows > len(counts):
            raise ValueError(f"feature {f} has {number} ids of {rows} rows from {first}, counts are of {len(counts)}")
    implementation("count_ids_", backend)(counts, ids, ids_per_feature, first_row, num_rows)


def _fake(counts: Tensor, *arguments: Any) -> None:
    return None


for _backend in ("reference", "triton"):
    register("count_ids_", _backend, reference.count_ids_)
if library.is_loaded():
    register("count_ids_", "cpu", torch.ops.torchrec_mpe.count_ids_)
    torch.library.impl("torchrec_mpe::count_ids_", "CUDA", reference.count_ids_)
    torch.library.register_fake("torchrec_mpe::count_ids_", _fake)
