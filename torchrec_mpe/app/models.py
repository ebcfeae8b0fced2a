"""The two click models of the command line: TorchRec's DLRM, and the MPE paper's DNN."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.mlp import MLP
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.modules.cached_embedding_bag_collection import CachedEmbeddingBagCollection
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection

ModelKind = Literal["dlrm", "dnn"]
_DNN_LAYERS = (256, 128, 64)
_DLRM_BOTTOM_LAYERS = (64,)
_DLRM_TOP_LAYERS = (256, 128, 1)


def table_configs(data: PreparedDataset, embedding_dim: int) -> list[EmbeddingBagConfig]:
    """One table per field, named like it but for characters that a module's name cannot have."""
    names: list[str] = []
    for field in data.fields:
        name = plain = re.sub(r"[./\\\x00-\x1f]", "_", f"t_{field.name}")
        taken = {*names, *(f"t_{other.name}" for other in data.fields if other is not field)}
        while name in taken:
            name = f"{plain}_{len(names)}" if name == plain else f"{name}_"
        names.append(name)
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=field.num_embeddings,
            embedding_dim=embedding_dim,
            feature_names=[field.name],
        )
        for field, name in zip(data.fields, names, strict=True)
    ]


class DNN(nn.Module):
    """Pooled embeddings and dense features side by side through a multi-layer perceptron with batch normalization.

    Source: the DNN backbone of MPE (arXiv 2409.20305, section 5.1), with smaller layers by default.

    Args:
        embedding_bag_collection (MPEEmbeddingBagCollection): F features of dimension D in all.
        dense_in_features (int): K dense features, 0 for none.
        layer_sizes (Sequence[int]): hidden layers.
    """

    def __init__(
        self,
        embedding_bag_collection: MPEEmbeddingBagCollection,
        dense_in_features: int,
        layer_sizes: Sequence[int] = _DNN_LAYERS,
    ) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding_bag_collection
        self.features = [f for t in embedding_bag_collection.embedding_bag_configs() for f in t.feature_names]
        width = dense_in_features + sum(
            t.embedding_dim * len(t.feature_names) for t in embedding_bag_collection.embedding_bag_configs()
        )
        layers: list[nn.Module] = []
        for size in layer_sizes:
            layers += [nn.Linear(width, size), nn.BatchNorm1d(size), nn.ReLU()]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Logits [B, 1] from dense features [B, K] and F sparse features."""
        pooled = self.embedding_bag_collection(sparse_features)
        # Sharded collections order their keys by sharding: go by name.
        logits: Tensor = self.layers(torch.cat([dense_features, *(pooled[f] for f in self.features)], dim=1))
        return logits


class ConstantDense(nn.Module):
    """Gives a model that needs dense features the constant 1 where the data has none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Logits [B, 1]."""
        logits: Tensor = self.model(dense_features.new_ones(len(dense_features), 1), sparse_features)
        return logits


def build_model(
    kind: ModelKind,
    tables: list[EmbeddingBagConfig],
    dense_in_features: int,
    *,
    device: torch.device,
    cache: CacheConfig | Mapping[str, CacheConfig] | None = None,
) -> nn.Module:
    """A click model: (dense features [B, K], sparse features) -> logits [B, 1].

    Args:
        kind (str): "dlrm" or "dnn".
        tables (List[EmbeddingBagConfig]): of one embedding dimension.
        dense_in_features (int): K, may be 0.
        device (torch.device): of the dense network; the rows are left on the meta device for the sharder.
        cache (Union[CacheConfig, Mapping[str, CacheConfig], None]): of all tables, or by name; rows of such tables are
            in INT8 or INT4, without in fp32.
    """
    meta = torch.device("meta")
    if cache is None:
        collection = MPEEmbeddingBagCollection(tables, device=meta)
    else:
        collection = CachedEmbeddingBagCollection(tables, device=meta, cache=cache)
    if kind == "dnn":
        model: nn.Module = DNN(collection, dense_in_features)
    else:
        dim = tables[0].embedding_dim
        model = DLRM(collection, max(1, dense_in_features), [*_DLRM_BOTTOM_LAYERS, dim], list(_DLRM_TOP_LAYERS), device)
        if dense_in_features == 0:
            model = ConstantDense(model)
    for name, child in model.named_modules():
        if isinstance(child, nn.Linear | nn.BatchNorm1d | MLP) and name:
            child.to(device)
    return model
