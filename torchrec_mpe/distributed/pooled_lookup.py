"""The lookup of a sharded collection: TorchRec's kernels and cached ones, in prepared phases with quantized rows."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.distributed.cached_embedding_kernel import CACHED_KERNEL, CachedEmbeddingBag, WideRows
from torchrec_mpe.distributed.quantized_forward import QuantizedForward
from torchrec_mpe.modules.row_quantizer import RowQuantizer
from torchrec_mpe.upstream.pooled_lookup import EmbeddingKernel, PooledLookup


class MPEPooledLookup(PooledLookup):
    """The tables of one sharding type, in kernels that are plain or cached as their compute kernel says.

    Tables without pooling are those of a prepared phase: their rows are quantized here, and pooled.

    Args:
        sharding (EmbeddingSharding): of the tables.
        mean_tables (Collection[str]): names of the tables of which quantized rows are pooled by mean.
        caches (Mapping[str, CacheConfig]): of the tables with the cached compute kernel, by name.
        wide_rows (Optional[Callable]): as :class:`CachedEmbeddingBag`; not kept.
    """

    def __init__(
        self,
        sharding: Any,
        mean_tables: Collection[str],
        caches: Mapping[str, CacheConfig] = MappingProxyType({}),
        wide_rows: WideRows | None = None,
    ) -> None:
        self._caches, self._wide_rows = caches, wide_rows  # before the kernels, which super() makes
        super().__init__(sharding)
        del self._caches, self._wide_rows  # has the whole plan
        self._quantizers: Mapping[int, RowQuantizer] = {}
        self._quantized = {
            kernel: QuantizedForward(kernel, self.gradient_factor, mean_tables)
            for kernel in self.kernels
            if kernel.config.pooling == PoolingType.NONE
        }

    def create_kernel(
        self, config: GroupedEmbeddingConfig, device: Any, pg: Any, sharding_type: Any, env: Any
    ) -> EmbeddingKernel:
        """TorchRec's, or a cached one."""
        if config.compute_kernel != CACHED_KERNEL:
            return super().create_kernel(config, device, pg, sharding_type, env)
        assert self._wide_rows is not None
        return CachedEmbeddingBag(config, self._caches, self._wide_rows, pg, device, sharding_type)

    def quantize_with(self, quantizers: Mapping[int, RowQuantizer], device: torch.device) -> None:
        """Enter a prepared phase.

        Args:
            quantizers (Mapping[int, RowQuantizer]): by embedding dimension, of the whole collection; their frequency
                ranks must be whole.
            device (torch.device): of the row maps, which are made here.
        """
        self._quantizers = dict(quantizers)
        for forward in self._quantized.values():
            forward.quantize_with(self._quantizers, device)

    def row_maps(self) -> list[Tensor]:
        """What each of the kernels' rows belongs to, a map a kernel; none in the plain phase."""
        return [forward.row_map for forward in self._quantized.values() if forward.row_map is not None]

    def look_up(self, kernel: EmbeddingKernel, features: KeyedJaggedTensor) -> Tensor:
        """The kernel's own pooled embeddings, or of its rows quantized."""
        forward = self._quantized.get(kernel)
        return super().look_up(kernel, features) if forward is None else forward(features)

    def writes_into_one_output(self, device: torch.device) -> bool:
        """Only if all kernels are TorchRec's own, and on no CPU."""
        cached = any(isinstance(kernel, CachedEmbeddingBag) for kernel in self.kernels)
        return not cached and not self._quantized and super().writes_into_one_output(device)

    def prefetch(self, sparse_features: KeyedJaggedTensor, forward_stream: Any = None) -> None:
        """TorchRec's, which knows its own kernels only, and that of the cached ones."""
        super().prefetch(sparse_features, forward_stream)
        for kernel, features in self.kernels_and_features(sparse_features):
            if isinstance(kernel, CachedEmbeddingBag):
                kernel.prefetch(features, forward_stream)

    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Pooled embeddings of all features.

        Every quantizer parameter's gradient waits for that of every lookup, also where it has no part in it. DDP
        averages a parameter's gradient as soon as it is complete. If that came before output dist's backward on a rank
        without tables and after it on another, the two would issue their collectives in different orders and hang.
        """
        pooled: Tensor = super().forward(sparse_features)
        if self._quantizers and torch.is_grad_enabled():
            parameters = [p for quantizer in self._quantizers.values() for p in quantizer.parameters()]
            pooled = _ZeroGradients.apply(pooled, *parameters)  # type: ignore[no-untyped-call]
        return pooled


class _ZeroGradients(torch.autograd.Function):
    """Its first argument; the others get a gradient of zeros once the first has one."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return pooled.view_as(pooled)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros_like(p) for p in ctx.saved_tensors)
