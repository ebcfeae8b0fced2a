"""The YAML file of tables."""

from pathlib import Path

import pytest
from torchrec.modules.embedding_configs import PoolingType

from torchrec_mpe.errors import UserError
from torchrec_mpe.inference.convert.checkpoint_tables import read_checkpoint_tables

GOOD = """
tables:
  - {name: t1, num_embeddings: 1_000, embedding_dim: 5}
  - {name: t2, num_embeddings: 7, embedding_dim: 4, feature_names: [a, b], pooling: mean, key: emb.0.weight}
  - {name: t3, num_embeddings: 7, embedding_dim: 4, feature_names: [c], weighted: true, pooling_factor: 20}
"""


def test_reads(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(GOOD)
    t1, t2, t3 = read_checkpoint_tables(tmp_path / "t.yaml")
    assert (t1.config.num_embeddings, t1.config.embedding_dim, t1.config.feature_names) == (1000, 5, ["t1"])
    assert (t1.weighted, t1.key, t3.weighted) == (False, None, True)
    assert (t2.config.feature_names, t2.config.pooling, t2.key) == (["a", "b"], PoolingType.MEAN, "emb.0.weight")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tables: [", "no YAML that can be read"),
        ("tables: []", "it needs a list `tables`"),
        ("tables: [{name: a}]\nmore: 1", "unknown entry more"),
        ("tables: [3]", "table 1 is no mapping of fields"),
        ("tables: [{name: a, num_embeddings: 3}]", "table a lacks the field embedding_dim"),
        ("tables: [{name: a, num_embeddings: 3, embedding_dim: 4, pool: sum}]", "table a has the unknown field pool"),
        ("tables: [{name: a.b, num_embeddings: 3, embedding_dim: 4}]", "name must be text without dots, got 'a.b'"),
        ("tables: [{name: a, num_embeddings: 0, embedding_dim: 4}]", "num_embeddings must be a positive integer"),
        ("tables: [{name: a, num_embeddings: 3, embedding_dim: 4, pooling: max}]", "pooling must be sum or mean"),
        ("tables: [{name: a, num_embeddings: 3, embedding_dim: 4, key: 7}]", "key must be the text of a key"),
        ("tables: [{name: a, num_embeddings: 3, embedding_dim: 4, weighted: 1}]", "weighted must be true or false"),
        (
            "tables: [{name: a, num_embeddings: 3, embedding_dim: 4, weighted: true, pooling: mean}]",
            "weighted mean pooling is not supported",
        ),
        ("tables: [{name: a, num_embeddings: 3, embedding_dim: 4, feature_names: f}]", "feature_names must be a list"),
        (
            "tables: [{name: a, num_embeddings: 3, embedding_dim: 4}, {name: a, num_embeddings: 3, embedding_dim: 4}]",
            "two tables have the name a",
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_checkpoint_tables(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value) and "\n" not in str(error.value)
