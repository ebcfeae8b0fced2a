"""The tables of a checkpoint, as people write them down."""

from pathlib import Path

from torchrec_mpe.errors import UserError
from torchrec_mpe.files.tables_file import read_listed_tables
from torchrec_mpe.inference.convert.checkpoint_tables import CheckpointTable

_REQUIRED = ("name", "num_embeddings", "embedding_dim")
_OPTIONAL = ("feature_names", "pooling", "weighted", "key", "pooling_factor")


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
