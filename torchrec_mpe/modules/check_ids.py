"""Ids of a batch that are no rows of their tables, found before a row is read or trained."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

_FATAL = (BoundsCheckMode.FATAL, BoundsCheckMode.V2_FATAL)
_WARNING = (BoundsCheckMode.WARNING, BoundsCheckMode.V2_WARNING)


@dataclass(frozen=True)
class FeatureRows:
    """What the ids of a feature must be rows of.

    Attributes:
        table (str): its name.
        rows (int): it has.
        mode (BoundsCheckMode): for other ids.
    """

    table: str
    rows: int
    mode: BoundsCheckMode = BoundsCheckMode.FATAL


def rows_of_features(
    configs: Iterable[EmbeddingBagConfig], modes: Mapping[str, BoundsCheckMode] | None = None
) -> dict[str, FeatureRows]:
    """By feature the table that it looks up, that with the fewest rows of several; ``modes`` are by table."""
    found: dict[str, FeatureRows] = {}
    for table in configs:
        mode = (modes or {}).get(table.name, BoundsCheckMode.FATAL)
        for feature in table.feature_names:
            if feature not in found or table.num_embeddings < found[feature].rows:
                found[feature] = FeatureRows(table.name, table.num_embeddings, mode)
    return found


def check_ids(features: KeyedJaggedTensor, rows: Mapping[str, FeatureRows]) -> KeyedJaggedTensor:
    """The batch with ids that are rows of their tables, as FBGEMM's bounds check modes say.

    In training an id of -1 is no row either: pruned rows are of inference. FATAL raises; WARNING and IGNORE look up row
    0, WARNING with the number of such ids; NONE looks at nothing. Batches on a GPU are left to FBGEMM's own check, for
    this one would wait for them.

    Args:
        features (KeyedJaggedTensor): any, of which some keys are in ``rows``.
        rows (Mapping[str, FeatureRows]): by feature.

    Returns:
        KeyedJaggedTensor: ``features``, or a copy with row 0 in place of other ids.

    Raises:
        IndexError: naming table and feature, in the mode FATAL.
    """
    ids = features.values()
    if ids.is_cuda or ids.is_meta or ids.numel() == 0:
        return features
    changed: dict[int, Tensor] = {}
    parts = ids.split(features.length_per_key())
    for k, (feature, part) in enumerate(zip(features.keys(), parts, strict=True)):
        of = rows.get(feature)
        if of is None or of.mode == BoundsCheckMode.NONE or part.numel() == 0:
            continue
        least, most = torch.aminmax(part)
        if int(least) >= 0 and int(most) < of.rows:
            continue
        wrong = (part < 0) | (part >= of.rows)
        first, where = int(part[wrong][0]), f"table {of.table}, feature {feature}"
        if of.mode in _FATAL:
            raise IndexError(f"{where}: id {first} is not in [0, {of.rows})")
        if of.mode in _WARNING:
            said = f"{where}: {int(wrong.sum())} ids of a batch, the first {first}, are not in [0, {of.rows})"
            warnings.warn(f"{said} and are looked up as row 0", stacklevel=2)
        changed[k] = part.masked_fill(wrong, 0)
    if not changed:
        return features
    return _with_values(features, torch.cat([changed.get(k, part) for k, part in enumerate(parts)]))


def _with_values(features: KeyedJaggedTensor, values: Tensor) -> KeyedJaggedTensor:
    batches: dict[str, Any] = {"stride": features.stride()}
    if features.variable_stride_per_key():
        batches = {"stride_per_key_per_rank": features.stride_per_key_per_rank()}
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=values,
        weights=features.weights_or_none(),
        lengths=features.lengths(),
        offsets=features.offsets_or_none(),
        inverse_indices=features.inverse_indices_or_none(),
        **batches,
    )
