"""Which tensors are tables, and where a table's rows are."""

import re
from collections.abc import Mapping

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from torchrec_mpe.inference.convert.checkpoint_tables import CheckpointTable, find_tables, locate_tables


class Files:
    """A checkpoint of shapes alone."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        raise NotImplementedError


TORCHREC = {
    "sparse.ebc.embedding_bags.t1.weight": (10, 4),
    "embedding_bags.t2.weight": (7, 3),
    "sparse.ebc.embedding_bags.t1.momentum1": (10, 4),
    "over.weight": (1, 4),
}


def table(name: str, rows: int, dim: int, key: str | None = None) -> CheckpointTable:
    return CheckpointTable(
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[name]), False, key
    )


def test_tables_of_embedding_bag_collections_are_found() -> None:
    found = find_tables(Files(TORCHREC))
    assert [(t.config.name, t.config.num_embeddings, t.config.embedding_dim, t.key) for t in found] == [
        ("t1", 10, 4, "sparse.ebc.embedding_bags.t1.weight"),
        ("t2", 7, 3, "embedding_bags.t2.weight"),
    ]
    assert found[0].config.feature_names == ["t1"] and found[0].config.pooling == PoolingType.SUM


def test_a_pattern_finds_others() -> None:
    files = Files({"emb_l.0.weight": (5, 4), "emb_l.1.weight": (6, 4), "top.weight": (5, 4), "emb_l.2.weight": (6,)})
    assert [t.config.name for t in find_tables(files, r"(emb_l\.\d+)\.weight")] == ["emb_l_0", "emb_l_1"]
    with pytest.raises(ValueError, match=re.escape("no key of the checkpoint matches")) as error:
        find_tables(files)
    assert "its matrices are emb_l.0.weight, emb_l.1.weight, top.weight" in str(error.value)
    with pytest.raises(ValueError, match="must have one group, the table's name, and has 0"):
        find_tables(files, "emb.*")
    with pytest.raises(ValueError, match="no regular expression"):
        find_tables(files, "(")
    with pytest.raises(ValueError, match=r"keys emb_l\.0\.weight and emb_l\.1\.weight both give a table emb_l"):
        find_tables(files, r"(emb_l)\.\d\.weight")


def test_tables_are_located() -> None:
    files = Files({**TORCHREC, "user.weight": (9, 2), "x.odd": (3, 2)})
    found = locate_tables(files, [table("t1", 10, 4), table("user", 9, 2), table("other", 3, 2, "x.odd")])
    assert dict(found) == {
        "t1": "sparse.ebc.embedding_bags.t1.weight",
        "user": "user.weight",
        "other": "x.odd",
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            table("t9", 10, 4),
            "table t9 is not in the checkpoint: no key ends in t9.weight; its matrices are",
        ),
        (
            table("t1", 11, 4),
            "table t1 has 11 rows of 4 elements, sparse.ebc.embedding_bags.t1.weight in",
        ),
        (table("t1", 10, 4, "nowhere"), "table t1: the checkpoint has no floating point tensor nowhere"),
        (
            table("twice", 1, 1),
            "table twice could be any of a.embedding_bags.twice.weight, b.embedding",
        ),
    ],
)
def test_mistakes(wrong: CheckpointTable, message: str) -> None:
    files = Files({**TORCHREC, **{f"{m}.embedding_bags.twice.weight": (1, 1) for m in "ab"}})
    with pytest.raises((KeyError, ValueError), match=re.escape(message)):
        locate_tables(files, [wrong])


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (0, 0)])
def test_tables_without_elements_are_named(shape: tuple[int, int]) -> None:
    files = Files({"embedding_bags.t.weight": shape})
    with pytest.raises(ValueError, match=re.escape(f"table t: embedding_bags.t.weight in the checkpoint has no elements, its shape is {list(shape)}")):  # fmt: skip  # noqa: E501
        find_tables(files)
