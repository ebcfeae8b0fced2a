"""What an embedding kernel's rows become in the search and retrain phases."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.distributed.cached_one_table_lookup import one_table_lookup
from torchrec_mpe.distributed.row_shard import shard_offsets
from torchrec_mpe.modules.row_quantizer import RowQuantizer
from torchrec_mpe.ops.bags import MEAN, SUM, Bags
from torchrec_mpe.upstream.pooled_lookup import EmbeddingKernel, dense_rows_of_features
from torchrec_mpe.upstream.variable_batches import rank_after_rank


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
    """The rows of one embedding kernel looked up unpooled, quantized, and pooled.

    Args:
        kernel (EmbeddingKernel): whose TBE returns unpooled rows.
        gradient_factor (float): multiplies the gradients of the quantizers' parameters.
        mean_tables (Collection[str]): names of the tables that are pooled by mean, here and not after output dist.

    Attributes:
        row_map (Optional[Tensor]): what each of the kernel's local rows belongs to, integer [rows of all tables]; None
            before there are quantizers.
    """

    def __init__(self, kernel: EmbeddingKernel, gradient_factor: float, mean_tables: Collection[str]) -> None:
        self._kernel = kernel
        self._gradient_factor = gradient_factor
        self._quantizers: Mapping[int, RowQuantizer] = {}
        self.row_map: Tensor | None = None
        self._runs = list(_runs(kernel, mean_tables))
        self._one_table = one_table_lookup(kernel.emb_module)

    def quantize_with(self, quantizers: Mapping[int, RowQuantizer], device: torch.device) -> None:
        """Quantize from now on with those of a new phase, by embedding dimension, whose ranks must be whole."""
        maps: list[Tensor] = []
        for table in self._kernel.config.embedding_tables:
            row, _ = shard_offsets(table)
            maps.append(quantizers[table.embedding_dim].row_map(table.name, row, row + table.local_rows))
        # Quantizers of different dimensions may have maps of different integer types.
        widest = max((m.dtype for m in maps), key=lambda dtype: dtype.itemsize)
        self.row_map = torch.cat([m.to(widest) for m in maps]).to(device)
        self._quantizers = quantizers

    def __call__(self, features: KeyedJaggedTensor) -> Tensor:
        """The pooled embeddings of the kernel's features.

        Returns:
            Tensor: [B, sum of local dims]; for variable batches of R ranks flat, rank after rank and within each
            feature after feature, as FBGEMM's TBE returns them.
        """
        assert self.row_map is not None
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
        elif (dense := dense_rows_of_features(self._kernel)) is not None:
            # FBGEMM's dense TBE ignores PoolingMode.NONE on CPU.
            parts = zip(ids.split(ids_per_feature), dense, strict=True)
            rows = torch.cat([F.embedding(part.long(), table) for part, table in parts])
        else:
            rows = self._kernel(equal)
        rows = rows.float()  # a TBE may be told to return FP16, too coarse for step sizes
        pooled: list[Tensor] = []
        first_bag = [0, *itertools.accumulate(bags)]
        for run in self._runs:
            start, stop = starts[run.first], starts[run.last]
            row_start, row_stop = row_starts[run.first], row_starts[run.last]
            # The gradient of a slice is as large as the whole.
            of_run = rows if len(rows) == row_stop - row_start else rows[row_start:row_stop]
            quantizer = self._quantizers[run.dim]
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
            pooled.append(quantizer(of_run, bags_of_run, self.row_map, run.columns, self._gradient_factor))
        if variable:
            parts_of = zip(pooled, self._runs, strict=True)
            of_features = [part for of_run, run in parts_of for part in of_run.split(bags[run.first : run.last])]
            return rank_after_rank(of_features, features.stride_per_key_per_rank())
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)


def _runs(kernel: EmbeddingKernel, mean_tables: Collection[str]) -> Iterator[_Run]:
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
        run.pooling_mode += [MEAN if table.name in mean_tables else SUM] * features
        first_row += table.local_rows
    if run is not None:
        yield run


def _equal_batches(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same ids in the same order, with empty bags added so that every feature has equally many."""
    lengths = pad_sequence(list(features.lengths().split(features.stride_per_key())), batch_first=True)
    return KeyedJaggedTensor(
        features.keys(), features.values(), features.weights_or_none(), lengths.flatten(), stride=lengths.shape[1]
    )
