"""A small retrained collection with every width, for tests of emission and artifacts."""

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from torchrec_mpe.packing.bit_widths import TableBitWidths

WIDTH = 17  # of the pooled output


def tables(sum_only: bool = False) -> list[EmbeddingBagConfig]:
    """Dimensions 4 and 5; t1 has two features, f2 is read by two tables, t2 pools by mean."""
    mean = PoolingType.SUM if sum_only else PoolingType.MEAN
    shapes = (
        ("t1", 12, 4, ["f1", "f2"], PoolingType.SUM),
        ("t2", 9, 5, ["f3"], mean),
        ("t3", 11, 4, ["f2"], PoolingType.SUM),
    )
    return [
        EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=d, feature_names=f, pooling=p)
        for n, r, d, f, p in shapes
    ]


def retrained(weighted: bool = False) -> mpe.MPEEmbeddingBagCollection:
    """All widths from 0 to 8 in every table; t1's ids are no ranks; rows and quantizers moved off their start."""
    model = mpe.MPEEmbeddingBagCollection(tables(weighted), is_weighted=weighted)
    g = torch.Generator().manual_seed(0)
    widths = {
        t.name: TableBitWidths(
            t.num_embeddings,
            t.embedding_dim,
            (*range(9), t.num_embeddings),
            (8, 7, 6, 5, 4, 3, 2, 1, 0),
            torch.randperm(t.num_embeddings, generator=g).to(torch.int32) if t.name == "t1" else None,
        )
        for t in tables()
    }
    mpe.prepare_retrain_(model, mpe.PrecisionPlan(widths, tuple(range(9))))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn(p.shape, generator=g)
    return model


def kjt(dtype: torch.dtype = torch.int64, weighted: bool = False) -> KeyedJaggedTensor:
    """Six bags of up to four ids for each feature, and a feature that no table reads."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 5, (4 * 6,), generator=g)
    values = torch.randint(0, 9, (int(lengths.sum()),), generator=g).to(dtype)
    weights = torch.rand(len(values), generator=g) if weighted else None
    return KeyedJaggedTensor.from_lengths_sync(["f3", "unused", "f1", "f2"], values, lengths, weights)


class Model(nn.Module):
    """A collection and dense layers with a buffer."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.sparse = nn.ModuleDict({"ebc": collection})
        self.norm = nn.BatchNorm1d(WIDTH)
        self.over = nn.Linear(WIDTH, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """Logits [B, 1]."""
        return self.over(self.norm(self.sparse["ebc"](features).values()))
