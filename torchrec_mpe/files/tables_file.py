"""Tables as people write them down: a YAML file with TorchRec's field names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from torchrec_mpe.errors import UserError

_POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}


@dataclass(frozen=True)
class ListedTable:
    """One table of a file.

    Attributes:
        where (str): file and table, as errors begin.
        config (EmbeddingBagConfig): TorchRec's config; ``feature_names`` is the table's name by default.
        weighted (bool): looked up with per-sample weights.
        fields (Mapping[str, Any]): all fields as given.
    """

    where: str
    config: EmbeddingBagConfig
    weighted: bool
    fields: Mapping[str, Any]


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader takes the last of a mapping's equal keys; here they are a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in keys:
                raise yaml.MarkedYAMLError(problem=f"{key} is given twice", problem_mark=key_node.start_mark)
            keys.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep)


def read_listed_tables(path: Path, required: Sequence[str], optional: Sequence[str]) -> list[ListedTable]:
    """Read a YAML file with a list ``tables``, whose fields are named as in TorchRec's EmbeddingBagConfig.

    ``name``, ``num_embeddings``, ``embedding_dim``, ``feature_names``, ``pooling`` ("sum" or "mean") and ``weighted``
    are checked here; further fields are the caller's to check.

    Args:
        path (Path): the file.
        required (Sequence[str]): fields that each table has, name, num_embeddings and embedding_dim among them.
        optional (Sequence[str]): fields that a table may have.

    Raises:
        UserError: naming the file, the table and the field that is missing, unknown, given twice or of a wrong type.
    """
    try:
        document = yaml.load(path.read_text(), _UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{where}: this is no YAML that can be read: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this is no YAML that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not isinstance(document.get("tables"), list) or not document["tables"]:
        raise UserError(f"{path}: it needs a list `tables` with at least one table")
    if unknown := sorted(set(map(str, document)) - {"tables"}):
        raise UserError(f"{path}: unknown entry {unknown[0]}; the file has a list `tables` and nothing else")
    tables: list[ListedTable] = []
    names: set[str] = set()
    for number, entry in enumerate(document["tables"], 1):
        table = _read_table(path, number, entry, required, optional)
        if table.config.name in names:
            raise UserError(f"{path}: two tables have the name {table.config.name}: table names must differ")
        names.add(table.config.name)
        tables.append(table)
    return tables


def _read_table(path: Path, number: int, entry: Any, required: Sequence[str], optional: Sequence[str]) -> ListedTable:
    where = f"{path}: table {number}"
    if not isinstance(entry, dict):
        raise UserError(f"{where} is no mapping of fields but {entry!r}: write `- name: ...` and so on")
    name = entry.get("name")
    if isinstance(name, str) and name:
        where = f"{path}: table {name}"
    for field in required:
        if field not in entry:
            raise UserError(f"{where} lacks the field {field}")
    if unknown := sorted(set(map(str, entry)) - {*required, *optional}):
        known = ", ".join((*required, *optional))
        raise UserError(f"{where} has the unknown field {unknown[0]}; the fields are {known}")
    if not isinstance(name, str) or not name or "." in name:
        raise UserError(f"{where}: name must be text without dots, got {name!r}")
    for field in ("num_embeddings", "embedding_dim"):
        value = entry[field]
        if type(value) is not int or value < 1:
            raise UserError(f"{where}: {field} must be a positive integer such as 1_000_000, got {value!r}")
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
    if weighted and _POOLING[pooling.lower()] == PoolingType.MEAN:
        raise UserError(
            f"{where}: weighted mean pooling is not supported; use sum pooling with weights already divided"
        )
    config = EmbeddingBagConfig(
        name=name,
        num_embeddings=entry["num_embeddings"],
        embedding_dim=entry["embedding_dim"],
        feature_names=features,
        pooling=_POOLING[pooling.lower()],
    )
    return ListedTable(where, config, weighted, entry)
