"""The tables of a model that is not built yet, as people write them down."""

import math
from dataclasses import dataclass
from pathlib import Path

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_mpe.errors import UserError
from torchrec_mpe.files.tables_file import ListedTable, read_listed_tables

_REQUIRED = ("name", "num_embeddings", "embedding_dim", "feature_names")
_OPTIONAL = ("pooling", "pooling_factor", "weighted")
_DIM_MULTIPLE = 4  # of FBGEMM's training TBE


@dataclass(frozen=True)
class PlannedTable:
    """One table of the file.

    Attributes:
        config (EmbeddingBagConfig): TorchRec's config.
        pooling_factors (tuple[float, ...]): mean number of ids an example, by feature.
        weighted (bool): looked up with per-sample weights.
    """

    config: EmbeddingBagConfig
    pooling_factors: tuple[float, ...]
    weighted: bool


def read_tables(path: Path, default_pooling_factor: float = 1.0) -> list[PlannedTable]:
    """Read a YAML file with a list ``tables``, whose fields are named as in TorchRec's EmbeddingBagConfig.

    Example::

        tables:
          - name: t_user                    # and so on for each table
            num_embeddings: 1_000_000_000
            embedding_dim: 64
            feature_names: [user]
            pooling: mean                   # sum by default
            pooling_factor: 20              # or one for each feature: [20, 3]
            weighted: false                 # the default

    Args:
        path (Path): the file.
        default_pooling_factor (float): of tables that give none.

    Raises:
        UserError: naming the file, the table and the field that is missing, unknown, given twice or of a wrong type.
    """
    tables: list[PlannedTable] = []
    for listed in read_listed_tables(path, _REQUIRED, _OPTIONAL):
        dim = listed.config.embedding_dim
        if dim % _DIM_MULTIPLE:
            raise UserError(
                f"{listed.where}: embedding_dim must be a multiple of {_DIM_MULTIPLE}, as FBGEMM's tables need, got "
                f"{dim}"
            )
        factors = _pooling_factors(listed, default_pooling_factor)
        tables.append(PlannedTable(listed.config, factors, listed.weighted))
    return tables


def _pooling_factors(listed: ListedTable, default: float) -> tuple[float, ...]:
    where, features = listed.where, len(listed.config.feature_names)
    given = listed.fields.get("pooling_factor", default)
    factors = given if isinstance(given, list) else [given] * features
    if len(factors) != features:
        raise UserError(f"{where}: pooling_factor has {len(factors)} numbers for {features} features")
    for factor in factors:
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not number or not math.isfinite(factor) or factor <= 0:
            raise UserError(
                f"{where}: pooling_factor must be a positive number, or one for each feature, got {given!r}"
            )
    return tuple(float(factor) for factor in factors)
