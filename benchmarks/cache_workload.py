"""What the cache benchmark measures on: tables, batches, TBEs of either side, and their steps."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from lookup import draw_ids
from torch import Tensor, nn

from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.statistics import CacheStatistics
from torchrec_mpe.cache.table_spec import CachedTableSpec

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """Tables and batches."""

    tables: int
    rows: int
    dim: int
    batch: int
    length: int

    def batches(self, ids: str, count: int, seed: int = 0) -> list[Batch]:
        """Ids, of table after table, and offsets, int64."""
        generator = torch.Generator().manual_seed(seed)
        numbers = [torch.randperm(self.rows, generator=generator) for _ in range(self.tables if "," in ids else 0)]
        offsets = torch.arange(0, self.tables * self.batch * self.length + 1, self.length)
        made: list[Batch] = []
        for _ in range(count):
            drawn = draw_ids(self.rows, ids.split(",")[0], self.tables * self.batch * self.length, generator).long()
            if numbers:
                of_tables = zip(numbers, drawn.chunk(self.tables), strict=True)
                drawn = torch.cat([number[part] for number, part in of_tables])
            made.append((drawn, offsets))
        return made

    def in_one_table(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same lookups in a single table that has the rows of all."""
        first = (torch.arange(self.tables) * self.rows).repeat_interleave(self.batch * self.length)
        return [(ids + first, offsets) for ids, offsets in batches]

    def fbgemm(
        self, precision: SparseType = SparseType.FP32, *, one_table: bool = False, uvm_caching: float | None = None
    ) -> SplitTableBatchedEmbeddingBagsCodegen:
        """FBGEMM's TBE; ``uvm_caching`` is the load factor of its cache in front of host memory."""
        cuda = torch.cuda.is_available()
        location = EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST
        if uvm_caching is not None:
            location = EmbeddingLocation.MANAGED_CACHING
        shapes = [(self.rows * self.tables, self.dim)] if one_table else [(self.rows, self.dim)] * self.tables
        tbe = SplitTableBatchedEmbeddingBagsCodegen(
            [(*shape, location, ComputeDevice.CUDA if cuda else ComputeDevice.CPU) for shape in shapes],
            feature_table_map=[0] * self.tables if one_table else None,
            weights_precision=precision,
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=0.02,
            device=this_device(),
            cache_load_factor=uvm_caching or 0.2,
        )
        tbe.init_embedding_weights_uniform(-0.01, 0.01)
        return tbe

    def cached(self, config: CacheConfig, optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD) -> Any:
        """Ours."""
        tbe = CachedTableBatchedEmbeddingBags(
            [CachedTableSpec(f"t{t}", self.rows, self.dim, config) for t in range(self.tables)],
            device=this_device(),
            optimizer=optimizer,
            learning_rate=0.02,
        )
        tbe.init_embedding_weights_uniform(-0.01, 0.01)
        return tbe


class Steps:
    """Training steps of one TBE over batches that come round; counts the seconds of its prefetch.

    Args:
        tbe: FBGEMM's or ours.
        batches (Sequence[Batch]): ids and offsets.
        network (Optional[nn.Module]): over the pooled embeddings; the backward then starts from the mean of its output,
            and without it from a fixed gradient.
    """

    def __init__(self, tbe: Any, batches: Sequence[Batch], network: nn.Module | None = None) -> None:
        self.tbe = tbe.train()
        self.prefetch_seconds: list[float] = []
        self._network = network
        self._prefetches = isinstance(tbe, CachedTableBatchedEmbeddingBags)
        device = this_device()
        self._batches: Iterator[Batch] = itertools.cycle([(ids.to(device), offs.to(device)) for ids, offs in batches])
        self._gradient: Tensor | None = None

    def __call__(self) -> None:
        ids, offsets = next(self._batches)
        if self._prefetches:
            begin = time.perf_counter()
            self.tbe.prefetch(ids, offsets)
            _synchronize()
            self.prefetch_seconds.append(time.perf_counter() - begin)
        output = self.tbe(ids, offsets)
        if self._network is not None:
            self._network(output).mean().backward()
        else:
            if self._gradient is None:
                self._gradient = torch.randn_like(output) * 1e-3
            output.backward(self._gradient)
        _synchronize()


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def network(load: Workload) -> nn.Module:
    """The layers that TorchRec's DLRM example has over its embeddings."""
    sizes = (load.tables * load.dim, 512, 512, 256)
    layers: list[nn.Module] = []
    for size, next_size in itertools.pairwise(sizes):
        layers += [nn.Linear(size, next_size), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1)).to(this_device())


def counted(tbe: CachedTableBatchedEmbeddingBags) -> CacheStatistics:
    """Counters of all tables so far."""
    return sum(tbe.cache_statistics(), CacheStatistics())


def module_bytes(module: torch.nn.Module) -> int:
    """Bytes of the distinct parameters and buffers of FBGEMM's TBE: rows, optimizer state and the little else."""
    tensors = {t.data_ptr(): t.nbytes for t in itertools.chain(module.parameters(), module.buffers()) if t.nbytes}
    return sum(tensors.values())
