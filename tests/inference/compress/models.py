"""Small click models over two collections' worth of features, and their batches, for tests of coded tables."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

KEYS = {"a": 3, "b@t1": 3, "b@t2": 4, "c": 2}
ROWS = {"a": 9, "b": 8, "c": 7}


def tables() -> list[EmbeddingBagConfig]:
    """Three dimensions; t1 has two features, b is read by two tables, t3 pools by mean."""
    shapes = (
        ("t1", 9, 3, ["a", "b"], PoolingType.SUM),
        ("t2", 8, 4, ["b"], PoolingType.SUM),
        ("t3", 7, 2, ["c"], PoolingType.MEAN),
    )
    return [
        EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=d, feature_names=f, pooling=p)
        for n, r, d, f, p in shapes
    ]


class Click(nn.Module):
    """Dense features and pooled embeddings through a network, (dense [B, 2], sparse) -> [B, heads].

    Args:
        heads (int): outputs.
        linear (bool): one linear layer; otherwise two, with batch normalization between.
    """

    def __init__(
        self, heads: int = 1, linear: bool = False, collection: EmbeddingBagCollectionInterface | None = None
    ) -> None:
        super().__init__()
        self.ebc: Any = collection or EmbeddingBagCollection(tables=tables())
        width = 2 + sum(KEYS.values())
        if linear:
            self.network: nn.Module = nn.Linear(width, heads)
        else:
            self.network = nn.Sequential(
                nn.Linear(width, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(), nn.Linear(6, heads)
            )

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        pooled = self.ebc(sparse_features)
        logits: Tensor = self.network(torch.cat([dense_features, *(pooled[key] for key in KEYS)], dim=1))
        return logits


def click(heads: int = 1, linear: bool = False) -> Click:
    """In float64, so that finite differences are exact to many digits; in eval mode, with moved statistics."""
    torch.manual_seed(0)
    model = Click(heads, linear).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.train()
    model(*arguments(batch(7)))
    return model.eval()


def batch(seed: int, size: int = 6) -> Any:
    """As torchrec.datasets' Batch: dense_features, sparse_features and labels."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(ROWS), size), generator=g)
    lengths[:, 0] = 2
    ids = [torch.randint(rows, (int(n.sum()),), generator=g) for rows, n in zip(ROWS.values(), lengths, strict=True)]
    return SimpleNamespace(
        dense_features=torch.randn(size, 2, generator=g, dtype=torch.float64),
        sparse_features=KeyedJaggedTensor.from_lengths_sync(list(ROWS), torch.cat(ids), lengths.flatten()),
        labels=(torch.rand(size, generator=g) < 0.4).double(),
    )


def arguments(of: Any) -> tuple[Tensor, KeyedJaggedTensor]:
    return of.dense_features, of.sparse_features


Loss = Callable[[Tensor, Any], Tensor]
