"""Which tensors of a checkpoint are embedding tables."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_mpe.errors import UserError
from torchrec_mpe.files.tables_file import read_listed_tables
from torchrec_mpe.inference.convert.checkpoint_files import CheckpointFiles

TORCHREC_PATTERN = r"(?:^|.*\.)embedding_bags\.([^.]+)\.weight"
"""Keys of the tables of an EmbeddingBagCollection; the group is the table's name."""

_REQUIRED = ("name", "num_embeddings", "embedding_dim")
_OPTIONAL = ("feature_names", "pooling", "weighted", "key", "pooling_factor")


@dataclass(frozen=True)
class CheckpointTable:
    """A table and where its rows are.

    Attributes:
        config (EmbeddingBagConfig): name, shape, features and pooling.
        weighted (bool): looked up with per-sample weights.
        key (Optional[str]): of the checkpoint's tensor; None: by the table's name.
    """

    config: EmbeddingBagConfig
    weighted: bool = False
    key: str | None = None


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
        UserError: naming the file, the table and the field that is missing, unknown, given twice or of a wrong
            type.
    """
    tables: list[CheckpointTable] = []
    for listed in read_listed_tables(path, _REQUIRED, _OPTIONAL):
        key = listed.fields.get("key")
        if key is not None and (not isinstance(key, str) or not key):
            raise UserError(f"{listed.where}: key must be the text of a key in the checkpoint, got {key!r}")
        tables.append(CheckpointTable(listed.config, listed.weighted, key))
    return tables


def find_tables(files: CheckpointFiles, pattern: str = TORCHREC_PATTERN) -> list[CheckpointTable]:
    """The matrices whose whole key matches a pattern; each table's feature is called like the table, pooled by sum.

    Args:
        files (CheckpointFiles): the checkpoint.
        pattern (str): regular expression with one group, the table's name; dots in it become underscores.

    Raises:
        ValueError: if the pattern is none, nothing matches it, two keys give one name, or a table has no elements.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    if compiled.groups != 1:
        raise ValueError(f"{pattern!r} must have one group, the table's name, and has {compiled.groups}")
    tables: dict[str, CheckpointTable] = {}
    for key, shape in files.shapes.items():
        found = compiled.fullmatch(key)
        if found is None or len(shape) != 2:
            continue
        name = found[1].replace(".", "_")
        if name in tables:
            raise ValueError(f"the keys {tables[name].key} and {key} both give a table {name}")
        _check_elements(name, key, shape)
        config = EmbeddingBagConfig(name=name, num_embeddings=shape[0], embedding_dim=shape[1], feature_names=[name])
        tables[name] = CheckpointTable(config, key=key)
    if not tables:
        raise ValueError(f"no key of the checkpoint matches {pattern!r}; its matrices are {_matrices(files)}")
    return list(tables.values())


def locate_tables(files: CheckpointFiles, tables: Sequence[CheckpointTable]) -> Mapping[str, str]:
    """The key of each table: its own, else the one that ends in ``embedding_bags.<name>.weight`` or ``<name>.weight``.

    Raises:
        KeyError: naming the table, if the checkpoint lacks it.
        ValueError: naming the table, if several keys could be it, or the shape is another or without elements.
    """
    keys: dict[str, str] = {}
    for table in tables:
        name = table.config.name
        key = table.key if table.key is not None else _key_by_name(files, name)
        if key not in files.shapes:
            raise KeyError(
                f"table {name}: the checkpoint has no floating point tensor {key}; its matrices are {_matrices(files)}"
            )
        shape = (table.config.num_embeddings, table.config.embedding_dim)
        if files.shapes[key] != shape:
            raise ValueError(
                f"table {name} has {shape[0]} rows of {shape[1]} elements, {key} in the checkpoint has the shape "
                f"{list(files.shapes[key])}"
            )
        _check_elements(name, key, shape)
        keys[name] = key
    return keys


def _check_elements(name: str, key: str, shape: tuple[int, ...]) -> None:
    if 0 in shape:
        raise ValueError(f"table {name}: {key} in the checkpoint has no elements, its shape is {list(shape)}")


def _key_by_name(files: CheckpointFiles, name: str) -> str:
    for ending in (f"embedding_bags.{name}.weight", f"{name}.weight"):
        found = [key for key in files.shapes if f".{key}".endswith(f".{ending}")]
        if len(found) > 1:
            raise ValueError(f"table {name} could be any of {', '.join(found)}: give its key")
        if found:
            return found[0]
    raise KeyError(
        f"table {name} is not in the checkpoint: no key ends in {name}.weight; its matrices are {_matrices(files)}"
    )


def _matrices(files: CheckpointFiles) -> str:
    found = [key for key, shape in files.shapes.items() if len(shape) == 2]
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return (", ".join(found[:5]) or "none") + more
