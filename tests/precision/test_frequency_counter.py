"""FrequencyCounter by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.precision.frequency_counter import FrequencyCounter, count_frequencies

TABLES = [
    EmbeddingBagConfig(name="t1", num_embeddings=4, embedding_dim=4, feature_names=["a", "b"]),
    EmbeddingBagConfig(name="t2", num_embeddings=3, embedding_dim=4, feature_names=["b"]),
]


def kjt(dtype: torch.dtype = torch.int64) -> KeyedJaggedTensor:
    """Bags a: [3, 3], []; b: [1], [0, 1]; c, which no table reads: [77], []."""
    values = torch.tensor([3, 3, 1, 0, 1, 77], dtype=dtype)
    return KeyedJaggedTensor.from_lengths_sync(["a", "b", "c"], values, torch.tensor([2, 0, 1, 2, 1, 0]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counts_shared_tables_and_features(dtype: torch.dtype) -> None:
    counter = FrequencyCounter(TABLES)
    counter.update(kjt(dtype))
    assert counter["t1"].tolist() == [1, 2, 0, 2]
    assert counter["t2"].tolist() == [1, 2, 0]
    counter.update(kjt(dtype))
    assert counter["t1"].tolist() == [2, 4, 0, 4]
    assert list(counter) == ["t1", "t2"] and len(counter) == 2


def test_merge_save_load(tmp_path: Path) -> None:
    one, two = FrequencyCounter(TABLES), FrequencyCounter(TABLES)
    one.update(kjt())
    two.update(kjt())
    assert one.merge(two)["t1"].tolist() == [2, 4, 0, 4]
    one.save(tmp_path / "counts.safetensors")
    loaded = FrequencyCounter.load(tmp_path / "counts.safetensors")
    assert {t: c.tolist() for t, c in loaded.items()} == {"t1": [2, 4, 0, 4], "t2": [2, 4, 0]}
    assert [p.name for p in tmp_path.iterdir()] == ["counts.safetensors"]


def test_merge_refuses_other_tables() -> None:
    with pytest.raises(ValueError, match="different tables"):
        FrequencyCounter(TABLES).merge(FrequencyCounter(TABLES[:1]))


@pytest.mark.parametrize("bad", [-1, 4])
def test_id_outside_its_table_is_named_and_nothing_is_added(bad: int) -> None:
    counter = FrequencyCounter(TABLES)
    features = KeyedJaggedTensor.from_lengths_sync(["b", "a"], torch.tensor([1, bad]), torch.tensor([1, 1]))
    with pytest.raises(IndexError, match=r"feature a .* table t1"):
        counter.update(features)
    assert counter["t2"].sum() == 0


MEANS = [
    EmbeddingBagConfig(name="t1", num_embeddings=4, embedding_dim=4, feature_names=["a", "b"]),
    EmbeddingBagConfig(name="t2", num_embeddings=3, embedding_dim=4, feature_names=["b"], pooling=PoolingType.MEAN),
]


def weighted_kjt() -> KeyedJaggedTensor:
    """Bags a: [3, 3], []; b: [1], [0, 1]."""
    return KeyedJaggedTensor(
        ["a", "b"], torch.tensor([3, 3, 1, 0, 1]), torch.tensor([0.5, 2, 1, 3, 4]), torch.tensor([2, 0, 1, 2])
    )


def test_squared_weights_of_means_and_of_weights(tmp_path: Path) -> None:
    counter = FrequencyCounter(MEANS)
    assert counter.squared_weights["t2"].tolist() == [0, 0, 0] and "t1" not in counter.squared_weights
    counter.update(kjt())
    assert counter.squared_weights["t2"].tolist() == [0.25, 1.25, 0] and "t1" not in counter.squared_weights
    counter.update(weighted_kjt())
    assert counter["t1"].tolist() == [2, 4, 0, 4]
    assert counter.squared_weights["t1"].tolist() == [1 + 9, 2 + 17, 0, 2 + 4.25]
    assert counter.squared_weights["t2"].tolist() == [0.5, 2.5, 0]  # of a mean, whatever the weights
    counter.update(kjt())
    assert counter.squared_weights["t1"].tolist() == [11, 21, 0, 8.25]
    counter.save(tmp_path / "counts.safetensors")
    loaded = FrequencyCounter.load(tmp_path / "counts.safetensors")
    assert list(loaded) == ["t1", "t2"] and loaded["t1"].tolist() == [3, 6, 0, 6]
    assert loaded.squared_weights["t2"].tolist() == [0.75, 3.75, 0]


def test_squared_weights_are_merged() -> None:
    one, two = FrequencyCounter(MEANS), FrequencyCounter(MEANS)
    one.update(kjt())
    two.update(weighted_kjt())
    assert one.merge(two).squared_weights["t1"].tolist() == [10, 19, 0, 6.25]
    assert one.squared_weights["t2"].tolist() == [0.5, 2.5, 0]
    tracked = FrequencyCounter.from_counts(dict(two))  # nobody knows the lengths of its bags
    assert "t2" not in one.merge(tracked).squared_weights and one["t2"].tolist() == [3, 6, 0]
    with pytest.raises(ValueError, match="squared weights of table t1 must be of the shape of its counts"):
        FrequencyCounter.from_counts({"t1": torch.tensor([1, 2])}, {"t1": torch.zeros(3)})


def test_unknown_table() -> None:
    with pytest.raises(KeyError, match="no counts for table t9; counted tables: t1, t2"):
        FrequencyCounter(TABLES)["t9"]


def test_load_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a frequency file"):
        FrequencyCounter.load(tmp_path / "text")
    save_file({"t": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not a frequency file"):
        FrequencyCounter.load(tmp_path / "other")


def test_counts_of_a_model_from_batches() -> None:
    model = torch.nn.Sequential(EmbeddingBagCollection(TABLES))
    batch = Batch(torch.zeros(2, 0), kjt(), torch.zeros(2))
    assert count_frequencies([batch, kjt()], model)["t2"].tolist() == [2, 4, 0]


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="table t must be non-negative"):
        FrequencyCounter.from_counts({"t": torch.tensor([1, -1])})


def test_counting_nothing_is_an_error() -> None:
    model = torch.nn.Sequential(EmbeddingBagCollection(TABLES))
    with pytest.raises(ValueError, match="no batches to count"):
        count_frequencies(iter(()), model)
    other = KeyedJaggedTensor.from_lengths_sync(["x"], torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"no table reads any of the features \['x'\]; counted features: a, b"):
        FrequencyCounter(TABLES).update(other)
    with pytest.raises(ValueError, match="loaded counts can be merged, not updated"):
        FrequencyCounter.from_counts({"t1": torch.tensor([1, 2])}).update(kjt())
