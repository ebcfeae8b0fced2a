"""The pooled embeddings that a model's network reads, where its gradients end."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import LazyAwaitable, LazyNoWait
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedTensor

from torchrec_mpe.precision.frequency_counter import embedding_bag_configs
from torchrec_mpe.upstream.embedding_bag_collection import tables_of_sharded
from torchrec_mpe.upstream.feature_processed import sharded_collection_inside


class PooledLeaves:
    """What a model's EmbeddingBagCollections, plain or sharded, put out: leaves of the graph while :meth:`cut`.

    The rows see no gradient, so that no fused optimizer updates them.

    Args:
        model (nn.Module): that is called.

    Attributes:
        configs (List[EmbeddingBagConfig]): of all tables.

    Raises:
        ValueError: if there is no collection, or two have a table of the same name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.configs: list[EmbeddingBagConfig] = embedding_bag_configs(model)
        if not self.configs:
            raise ValueError(f"{type(model).__name__} holds no EmbeddingBagCollection")
        self._table_of_embedding: dict[nn.Module, dict[str, str]] = {}
        around: set[nn.Module] = set()
        for module in model.modules():
            # One around a sharded collection does not call it, and puts out the same.
            if inner := sharded_collection_inside(module):
                around.add(inner)
                self._table_of_embedding[module] = _table_of_embedding(tables_of_sharded(inner))
            elif module in around:
                continue
            elif isinstance(module, ShardedEmbeddingBagCollection):
                self._table_of_embedding[module] = _table_of_embedding(tables_of_sharded(module))
            elif isinstance(module, EmbeddingBagCollectionInterface):
                self._table_of_embedding[module] = _table_of_embedding(module.embedding_bag_configs())
        self._leaves: list[tuple[nn.Module, KeyedTensor]] = []

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Look up without gradients, and let the graph begin at what is put out."""
        with ExitStack() as hooks, torch.enable_grad():
            for module in self._table_of_embedding:
                hooks.callback(module.register_forward_pre_hook(_without_gradients).remove)
                hooks.callback(module.register_forward_hook(self._keep).remove)
            try:
                yield
            finally:
                self.forget()

    def gradients(self, outputs: Tensor, factor: Tensor, *, keep_graph: bool) -> Iterator[tuple[str, Tensor]]:
        """Of ``sum(outputs * factor)`` in what was put out since :meth:`forget`.

        Args:
            outputs (Tensor): of the model.
            factor (Tensor): of the same shape.
            keep_graph (bool): to be asked again.

        Yields:
            tuple[str, Tensor]: table and gradient, float64 [batch, D], once for each of its features; nothing where the
            outputs do not depend on what a collection put out.
        """
        if not self._leaves or not outputs.requires_grad:
            return
        values = [leaf.values() for _, leaf in self._leaves]
        found = torch.autograd.grad(outputs, values, factor, retain_graph=keep_graph, allow_unused=True)
        for (module, leaf), gradient in zip(self._leaves, found, strict=True):
            if gradient is not None:
                parts = gradient.double().split(leaf.length_per_key(), dim=1)
                for name, part in zip(leaf.keys(), parts, strict=True):
                    yield self._table_of_embedding[module][name], part

    def forget(self) -> None:
        """Drop what was put out so far."""
        self._leaves.clear()

    def _keep(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        pooled = output.wait() if isinstance(output, LazyAwaitable) else output
        torch.set_grad_enabled(True)
        values = pooled.values().detach().requires_grad_()
        leaf = KeyedTensor(keys=pooled.keys(), length_per_key=pooled.length_per_key(), values=values)
        self._leaves.append((module, leaf))
        return LazyNoWait(leaf) if isinstance(output, LazyAwaitable) else leaf


def _without_gradients(module: nn.Module, arguments: Any) -> None:
    torch.set_grad_enabled(False)


def _table_of_embedding(configs: list[EmbeddingBagConfig]) -> dict[str, str]:
    names = get_embedding_names_by_table(configs)
    return {name: config.name for config, of_table in zip(configs, names, strict=True) for name in of_table}
