"""Tables written down in YAML, and every mistake that can be made there."""

from pathlib import Path

import pytest
from torchrec.modules.embedding_configs import PoolingType

from torchrec_mpe.distributed.planner.planned_tables import read_tables
from torchrec_mpe.errors import UserError

GOOD = """
tables:
  - name: t_user
    num_embeddings: 1_000_000
    embedding_dim: 64
    feature_names: [user, friend]
    pooling: MEAN
    pooling_factor: [20, 3.5]
  - {name: t_item, num_embeddings: 7, embedding_dim: 8, feature_names: [item], weighted: true}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_fields(tmp_path: Path) -> None:
    user, item = read_tables(write(tmp_path / "tables.yaml", GOOD), 2.0)
    assert (user.config.name, user.config.num_embeddings, user.config.embedding_dim) == ("t_user", 1_000_000, 64)
    assert (user.config.feature_names, user.config.pooling) == (["user", "friend"], PoolingType.MEAN)
    assert (user.pooling_factors, user.weighted) == ((20.0, 3.5), False)
    assert (item.config.pooling, item.pooling_factors, item.weighted) == (PoolingType.SUM, (2.0,), True)


TABLE = "tables: [{name: t, num_embeddings: 10, embedding_dim: 8, feature_names: [f]%s}]"
MISTAKES = {
    "tables: [": "line 1: this is no YAML that can be read",
    "[]": "it needs a list `tables` with at least one table",
    "tables: []": "it needs a list `tables` with at least one table",
    "tables: 3": "it needs a list `tables` with at least one table",
    "tables: [3]": "table 1 is no mapping of fields but 3",
    TABLE.replace("tables", "batch: 3\ntables") % "": "unknown entry batch",
    "tables: [{name: t, embedding_dim: 8, feature_names: [f]}]": "table t lacks the field num_embeddings",
    "tables: [{num_embeddings: 1, embedding_dim: 8, feature_names: [f]}]": "table 1 lacks the field name",
    TABLE % ", num_embedings: 3": "table t has the unknown field num_embedings; the fields are name",
    TABLE % ", name: u": "line 1: this is no YAML that can be read: name is given twice",
    TABLE.replace("10", "1e9") % "": "table t: num_embeddings must be a positive integer such as 1_000_000, got '1e9'",
    TABLE.replace("10", "true") % "": "table t: num_embeddings must be a positive integer such as 1_000_000, got True",
    TABLE.replace("10", "0") % "": "table t: num_embeddings must be a positive integer",
    TABLE.replace("8", "6") % "": "table t: embedding_dim must be a multiple of 4, as FBGEMM's tables need, got 6",
    TABLE.replace("name: t", "name: 3") % "": "table 1: name must be text without dots, got 3",
    TABLE.replace("name: t", "name: a.b") % "": "table a.b: name must be text without dots, got 'a.b'",
    TABLE.replace("[f]", "f") % "": "table t: feature_names must be a list of at least one name, got 'f'",
    TABLE.replace("[f]", "[f, f]") % "": "table t: feature_names has a feature twice: f, f",
    TABLE % ", pooling: max": "table t: pooling must be sum or mean, got 'max'",
    TABLE % ", weighted: 1": "table t: weighted must be true or false, got 1",
    TABLE % ", weighted: true, pooling: mean": "table t: weighted mean pooling is not supported",
    TABLE % ", pooling_factor: [1, 2]": "table t: pooling_factor has 2 numbers for 1 features",
    TABLE % ", pooling_factor: -1": "table t: pooling_factor must be a positive number, or",
    TABLE % ", pooling_factor: .nan": "table t: pooling_factor must be a positive number",
    TABLE.replace("}]", "}, {name: t, num_embeddings: 1, embedding_dim: 8, feature_names: [g]}]") % "": (
        "two tables have the name t: table names must differ"
    ),
    "tables: !!python/object/apply:os.system [echo]": "this is no YAML that can be read",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_told_in_one_sentence(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tables.yaml", text)
    with pytest.raises(UserError) as raised:
        read_tables(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert MISTAKES[text] in message
    assert "\n" not in message
