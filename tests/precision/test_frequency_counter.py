"""FrequencyCounter by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
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
