"""Method names, evaluation by hand, and the models' inputs."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe import MPEEmbeddingBagCollection
from torchrec_mpe.app.cli.result_table import result_table
from torchrec_mpe.app.models import build_model
from torchrec_mpe.app.training.loop import evaluate
from torchrec_mpe.app.training.method import Method
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.errors import UserError


@pytest.mark.parametrize(
    ("name", "kind", "numbers"),
    [("fp32", "fp32", ()), ("uniform:6", "uniform", (6,)), ("cut:4:0.1", "cut", (4, 0.1)), ("rule:60", "rule", (60,))],
)
def test_method_names(name: str, kind: str, numbers: tuple[float, ...]) -> None:
    assert Method.parse(name) == Method(name, kind, numbers)


def test_coded_method_names() -> None:
    assert Method.parse("coded:100") == Method("coded:100", "coded", (100,), distills=True)
    assert Method.parse("coded:1.5:nodistill") == Method("coded:1.5:nodistill", "coded", (1.5,), distills=False)


@pytest.mark.parametrize(
    ("name", "bits", "load_factor", "algorithm"),
    [
        ("cache:int8:0.05", 8, 0.05, CacheAlgorithm.LRU),
        ("cache:int8:0.05:lfu", 8, 0.05, CacheAlgorithm.LFU),
        ("cache:int4:1e-2", 4, 0.01, CacheAlgorithm.LFU),
        ("cache:int4:1:lru", 4, 1.0, CacheAlgorithm.LRU),
    ],
)
def test_cache_method_names(name: str, bits: Any, load_factor: float, algorithm: CacheAlgorithm) -> None:
    assert Method.parse(name) == Method(name, "cache", (), CacheConfig(bits, load_factor, algorithm))


@pytest.mark.parametrize(
    "name",
    [
        "cache",
        "cache:",
        "cache:int8",
        "cache:int8:",
        "cache:int8:0",
        "cache:int8:nan",
        "cache:fp16:1",
    ],
)
def test_unknown_cache_methods(name: str) -> None:
    with pytest.raises(UserError, match="use cache:int8:FRACTION"):
        Method.parse(name)


@pytest.mark.parametrize(
    "name", ["", "fp16", "fp32:1", "uniform", "uniform:x", "uniform:0", "cut:4", "rule:-3", "rule:nan"]
)
def test_unknown_methods(name: str) -> None:
    with pytest.raises(UserError, match="method"):
        Method.parse(name)


class _Data:
    """Two batches of given dense features and labels."""

    def batches(self, split: str, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
        assert (split, rank, world_size) == ("test", 0, 1)
        kjt = KeyedJaggedTensor.from_lengths_sync(["f"], torch.zeros(2, dtype=torch.int64), torch.ones(2).long())
        for scores, labels in (([0.0, 2.0], [0.0, 1.0]), ([2.0, -1.0], [0.0, 1.0])):
            yield Batch(torch.tensor(scores).unsqueeze(1), kjt, torch.tensor(labels))


class _First(nn.Module):
    def forward(self, dense: Tensor, sparse: Any) -> Tensor:
        return dense[:, :1]


def test_auc_and_log_loss_by_hand() -> None:
    """Positives score 2 and -1, negatives 0 and 2: 2 beats 0, ties with 2; -1 beats none. AUC (1 + 1/2) / 4."""
    got = evaluate(_First(), _Data(), "test", torch.device("cpu"))  # type: ignore[arg-type]
    assert got["auc"] == pytest.approx(1.5 / 4)
    losses = [0.693147, 0.126928, 2.126928, 1.313262]  # softplus of 0, -2, 2 and 1
    assert got["logloss"] == pytest.approx(sum(losses) / 4, abs=1e-5)


def test_predictions_that_are_not_finite_end_the_job() -> None:
    class Diverged(_First):
        def forward(self, dense: Tensor, sparse: Any) -> Tensor:
            return dense[:, :1] / 0

    with pytest.raises(UserError, match="predictions of the test rows are not finite: training diverged"):
        evaluate(Diverged(), _Data(), "test", torch.device("cpu"))  # type: ignore[arg-type]


def test_labels_that_are_all_alike_have_no_auc() -> None:
    class OneClass(_Data):
        def batches(self, split: str, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
            for batch in super().batches(split, batch_size, rank, world_size):
                yield Batch(batch.dense_features, batch.sparse_features, torch.ones(2))

    got = evaluate(_First(), OneClass(), "test", torch.device("cpu"))  # type: ignore[arg-type]
    assert math.isnan(got["auc"]) and got["logloss"] > 0
    sizes = {"average_bits": 32.0, "embedding_bytes": 1, "compression_ratio": 1.0}
    line = result_table([{"method": "fp32", "seed": 0, "seconds": 1.0, **got, **sizes}]).splitlines()[1]
    assert line.split()[:2] == ["fp32", "-"]


@pytest.mark.parametrize("kind", ["dlrm", "dnn"])
@pytest.mark.parametrize("dense", [0, 3])
def test_models_take_dense_features_or_none(kind: Any, dense: int) -> None:
    tables = [EmbeddingBagConfig(name=f"t_{f}", num_embeddings=5, embedding_dim=4, feature_names=[f]) for f in "ab"]
    model = build_model(kind, tables, dense, device=torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, MPEEmbeddingBagCollection):
            module.to_empty(device="cpu")  # what the sharder does
    features = KeyedJaggedTensor.from_lengths_sync(["b", "a"], torch.tensor([1, 2, 3, 4]), torch.ones(4).long())
    assert model(torch.zeros(2, dense), features).shape == (2, 1)
