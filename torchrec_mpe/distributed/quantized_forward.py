"""What an embedding kernel's ``forward`` is in the search and retrain phases."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag, BatchedDenseEmbeddingBag
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.distributed.cached_one_table_lookup import one_table_lookup
from torchrec_mpe.modules.row_quantizer import RowQuantizer
from torchrec_mpe.ops.bags import MEAN, SUM, Bags


def shard_offsets(table: ShardedEmbeddingTable) -> tuple[int, int]:
    """First row and first column of a table's local shard."""
    if table.local_metadata is None:
        return 0, 0
    row, column = table.local_metadata.shard_offsets
    return row, column


@dataclass
class _Run:
    """Neighbouring features of a kernel that share embedding dimension and columns; see :class:`Bags`."""

    dim: int
    columns: slice
    first: int
    tables: list[str] = field(default_factory=list)
    first_row: list[int] = field(default_factory=list)
    num_rows: list[int] = field(default_factory=list)
    pooling_mode: list[int] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.first + len(self.tables)


class QuantizedForward:
    """``forward`` of one embedding kernel: its rows looked up unpooled, quantized, and pooled.

    An object and not a closure, so that a model can be deep-copied.

    Args:
        kernel (BaseBatchedEmbeddingBag): whose TBE returns unpooled rows.
        lookup (GroupedPooledEmbeddingsLookup): that the kernel is of; knows how gradients are scaled.
        quantizers (Callable): returns the replicated quantizers by embedding dimension.
        mean (Callable): whether a table is pooled by mean, given its name.

    The row map, what each of the kernel's local rows belongs to, is a buffer ``row_map`` of the kernel.
    """

    def __init__(
        self,
        kernel: BaseBatchedEmbeddingBag,
        lookup: GroupedPooledEmbeddingsLookup,
        quantizers: Callable[[], dict[int, RowQuantizer]],
        mean: Callable[[str], bool],
    ) -> None:
        self._kernel = kernel
        self._lookup = lookup
        self._quantizers = quantizers
        self._runs = list(_runs(kernel, mean))
        self._one_table = one_table_lookup(kernel.emb_module)

    def set_row_map(self, device: torch.device) -> None:
        """Make the map of the local rows from the quantizers of a new phase, whose ranks must be whole."""
        quantizers = self._quantizers()
        maps: list[Tensor] = []
        for table in self._kernel.config.embedding_tables:
            row, _ = shard_offsets(table)
            maps.append(quantizers[table.embedding_dim].row_map(table.name, row, row + table.local_rows))
        # Quantizers of different dimensions may have maps of different integer types.
        widest = max((m.dtype for m in maps), key=lambda dtype: dtype.itemsize)
        row_map = torch.cat([m.to(widest) for m in maps]).to(device)
        self._kernel.register_buffer("row_map", row_map, persistent=False)

    def __call__(self, features: KeyedJaggedTensor) -> Tensor:
        """The pooled embeddings of the kernel's features.

        Returns:
            Tensor: [B, sum of local dims]; for variable batches of R ranks flat, rank after rank and within each
            feature after feature, as FBGEMM's TBE returns them.
        """
        kernel = self._kernel
        variable: bool = features.variable_stride_per_key()
        bags: list[int] = features.stride_per_key()
        ids, offsets = features.values(), features.offsets()
        weights = features.weights_or_none()
        ids_per_feature = features.length_per_key()
        starts = [0, *itertools.accumulate(ids_per_feature)]  # of the features' ids
        row_starts = starts  # of the features' rows: fewer than ids if each distinct row was looked up once
        index: Tensor | None = None
        row_offsets: Tensor | None = None
        # FBGEMM has no unpooled rows of variable batches.
        equal = _equal_batches(features) if variable else features
        if self._one_table is not None:
            rows, ids, index, row_offsets = self._one_table(ids, equal.offsets(), equal.stride())
            row_starts = row_offsets.tolist()
        elif isinstance(kernel, BatchedDenseEmbeddingBag):
            rows = _rows_of_dense_kernel(kernel, ids, ids_per_feature)
        else:
            rows = type(kernel).forward(kernel, equal)
        rows = rows.float()  # a TBE may be told to return FP16, too coarse for step sizes
        pooled: list[Tensor] = []
        first_bag = [0, *itertools.accumulate(bags)]
        for run in self._runs:
            start, stop = starts[run.first], starts[run.last]
            row_start, row_stop = row_starts[run.first], row_starts[run.last]
            # The gradient of a slice is as large as the whole.
            of_run = rows if len(rows) == row_stop - row_start else rows[row_start:row_stop]
            quantizer = self._quantizers()[run.dim]
            bags_of_run = Bags(
                ids=ids[row_start:row_stop],
                offsets=offsets[first_bag[run.first] : first_bag[run.last] + 1],
                bags_per_feature=bags[run.first : run.last],
                first_row=run.first_row,
                num_rows=run.num_rows,
                table=[quantizer.table_number[table] for table in run.tables],
                pooling_mode=run.pooling_mode,
                per_sample_weights=None if weights is None else weights[start:stop],
                index=None if index is None else index[start:stop],
                row_offsets=None if row_offsets is None else row_offsets[run.first : run.last + 1],
                side_by_side=not variable,
            )
            factor = self._lookup._scale_gradient_factor
            pooled.append(quantizer(of_run, bags_of_run, kernel.row_map, run.columns, factor))
        if variable:
            return _rank_after_rank(pooled, [run.last - run.first for run in self._runs], features)
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)


def _runs(kernel: BaseBatchedEmbeddingBag, mean: Callable[[str], bool]) -> Iterator[_Run]:
    run: _Run | None = None
    first_row = 0
    for table in kernel.config.embedding_tables:
        _, column = shard_offsets(table)
        columns = slice(column, column + table.local_cols)
        if run is None or (run.dim, run.columns) != (table.embedding_dim, columns):
            if run is not None:
                yield run
            run = _Run(table.embedding_dim, columns, 0 if run is None else run.last)
        features = table.num_features()
        run.tables += [table.name] * features
        run.first_row += [first_row] * features
        run.num_rows += [table.local_rows] * features
        run.pooling_mode += [MEAN if mean(table.name) else SUM] * features
        first_row += table.local_rows
    if run is not None:
        yield run


def _rows_of_dense_kernel(kernel: BatchedDenseEmbeddingBag, ids: Tensor, ids_per_feature: list[int]) -> Tensor:
    """FBGEMM's dense TBE ignores PoolingMode.NONE on CPU, so its rows are gathered here."""
    # Not split_embedding_weights(), which detaches them: the rows' gradient goes through this gather. One split for all
    # tables, whose backward is one concatenation: that of a slice makes a gradient as large as all tables.
    tbe = kernel.emb_module
    parts_of = tbe.weights.split([rows * dim for rows, dim in tbe.embedding_specs])
    weights = [part.view(spec) for part, spec in zip(parts_of, tbe.embedding_specs, strict=True)]
    tables = [t for t, table in enumerate(kernel.config.embedding_tables) for _ in range(table.num_features())]
    parts = ids.split(ids_per_feature)
    return torch.cat([F.embedding(part.long(), weights[t]) for part, t in zip(parts, tables, strict=True)])


def _equal_batches(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same ids in the same order, with empty bags added so that every feature has equally many."""
    lengths = pad_sequence(list(features.lengths().split(features.stride_per_key())), batch_first=True)
    return KeyedJaggedTensor(
        features.keys(), features.values(), features.weights_or_none(), lengths.flatten(), stride=lengths.shape[1]
    )


def _rank_after_rank(pooled: list[Tensor], features_of: list[int], features: KeyedJaggedTensor) -> Tensor:
    """Pooled bags, feature after feature and within each rank after rank, in the order of output dist."""
    strides: list[list[int]] = features.stride_per_key_per_rank()
    chunks: list[tuple[Tensor, ...]] = []  # by feature, one a rank
    first = 0
    for bags, count in zip(pooled, features_of, strict=True):
        of_run = strides[first : first + count]
        parts = iter(bags.split([stride for of_feature in of_run for stride in of_feature]))
        chunks += [tuple(itertools.islice(parts, len(of_feature))) for of_feature in of_run]
        first += count
    return torch.cat([chunk.flatten() for of_rank in zip(*chunks, strict=True) for chunk in of_rank])


class MergeVariableBatches:
    """How a lookup of several kernels puts variable batches together, without FBGEMM's preallocated output.

    FBGEMM has none on CPU, and a kernel with :class:`QuantizedForward` does not write into one.

    Args:
        lookup (GroupedPooledEmbeddingsLookup): of which this replaces ``_forward_with_vbe_merging``.
    """

    def __init__(self, lookup: GroupedPooledEmbeddingsLookup) -> None:
        self._lookup = lookup

    def __call__(self, features_by_group: list[KeyedJaggedTensor], device: torch.device) -> Tensor:
        pooled = self._lookup._forward(features_by_group)
        chunks: list[list[Tensor]] = []  # by kernel, one a rank
        for kernel, features, flat in zip(self._lookup._emb_modules, features_by_group, pooled, strict=True):
            by_rank = zip(*features.stride_per_key_per_rank(), strict=True)
            dims = kernel.config.embedding_dims()
            sizes = [sum(b * d for b, d in zip(of_rank, dims, strict=True)) for of_rank in by_rank]
            chunks.append(list(flat.split(sizes)))
        return torch.cat([chunk for of_rank in zip(*chunks, strict=True) for chunk in of_rank])
