"""The tables of a checkpoint, as people write them down."""

from pathlib import Path
from typing import Any

import yaml
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from torchrec_mpe.convert.checkpoint_tables import CheckpointTable
from torchrec_mpe.errors import UserError

_REQUIRED = ("name", "num_embeddings", "embedding_dim")
_OPTIONAL = ("feature_names", "pooling", "weighted", "key", "pooling_factor")
_POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}


def read_checkpoint_tables(path: Path) -> list[CheckpointTable]:
    """Read a YAML file with a list ``tables``: that of `torchrec-mpe plan`, with a key where a name is not enough.

    Example::

        tables:
          - name: t_user                    # and so on for each table
            num_embeddings: 1_000_000
            embedding_dim: 64
            feature_names: [user]           # the table's name by default
            pooling: mean                   # sum by default
            weighted: false                 # the default
            key: emb_l.0.weight             # by default the key that ends in embedding_bags.<name>.weight
            pooling_factor: 20              # for the plan command, not read here

    Args:
        path (Path): the file.

    Raises:
        UserError: naming the file, the table and the field that is missing, unknown or of a wrong type.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this is no YAML that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not isinstance(document.get("tables"), list) or not document["tables"]:
        raise UserError(f"{path}: it needs a list `tables` with at least one table")
    if unknown := sorted(set(map(str, document)) - {"tables"}):
        raise UserError(f"{path}: unknown entry {unknown[0]}; the file has a list `tables` and nothing else")
    tables = [_read_table(path, number, entry) for number, entry in enumerate(document["tables"], 1)]
    names = [table.config.name for table in tables]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two tables have the name {name}: table names must differ")
    return tables


def _read_table(path: Path, number: int, entry: Any) -> CheckpointTable:
    where = f"{path}: table {number}"
    if not isinstance(entry, dict):
        raise UserError(f"{where} is no mapping of fields but {entry!r}: write `- name: ...` and so on")
    name = entry.get("name")
    if isinstance(name, str) and name:
        where = f"{path}: table {name}"
    for field in _REQUIRED:
        if field not in entry:
            raise UserError(f"{where} lacks the field {field}")
    if unknown := sorted(set(map(str, entry)) - {*_REQUIRED, *_OPTIONAL}):
        known = ", ".join((*_REQUIRED, *_OPTIONAL))
        raise UserError(f"{where} has the unknown field {unknown[0]}; the fields are {known}")
    if not isinstance(name, str) or not name or "." in name:
        raise UserError(f"{where}: name must be text without dots, got {name!r}")
    for field in ("num_embeddings", "embedding_dim"):
        if type(entry[field]) is not int or entry[field] < 1:
            raise UserError(f"{where}: {field} must be a positive integer such as 1_000_000, got {entry[field]!r}")
    features = entry.get("feature_names", [name])
    if not isinstance(features, list) or not features or not all(isinstance(f, str) and f for f in features):
        raise UserError(f"{where}: feature_names must be a list of at least one name, got {features!r}")
    if len(set(features)) < len(features):
        raise UserError(f"{where}: feature_names has a feature twice: {', '.join(features)}")
    pooling = entry.get("pooling", "sum")
    if not isinstance(pooling, str) or pooling.lower() not in _POOLING:
        raise UserError(f"{where}: pooling must be sum or mean, got {pooling!r}")
    weighted = entry.get("weighted", False)
    if not isinstance(weighted, bool):
        raise UserError(f"{where}: weighted must be true or false, got {weighted!r}")
    if weighted and pooling.lower() == "mean":
        raise UserError(
            f"{where}: weighted mean pooling is not supported; use sum pooling with weights already divided"
        )
    key = entry.get("key")
    if key is not None and (not isinstance(key, str) or not key):
        raise UserError(f"{where}: key must be the text of a key in the checkpoint, got {key!r}")
    config = EmbeddingBagConfig(
        name=name,
        num_embeddings=entry["num_embeddings"],
        embedding_dim=entry["embedding_dim"],
        feature_names=features,
        pooling=_POOLING[pooling.lower()],
    )
    return CheckpointTable(config, weighted, key)
