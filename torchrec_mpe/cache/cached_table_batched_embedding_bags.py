"""A table-batched embedding (TBE) whose rows live in low precision, with a full-precision cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn

from torchrec_mpe.cache.batch_ids import ids_per_table, within_tables
from torchrec_mpe.cache.cached_rows import CachedRows
from torchrec_mpe.cache.in_flight import BatchesInFlight, PrefetchedBatch, versions
from torchrec_mpe.cache.read_only_lookup import look_up
from torchrec_mpe.cache.slot_tbe import SlotTBE
from torchrec_mpe.cache.statistics import CacheStatistics
from torchrec_mpe.cache.table_spec import CachedTableSpec
from torchrec_mpe.ops.cache_tensors import BackingStore
from torchrec_mpe.ops.reference.lookup_counts import decode_counts
from torchrec_mpe.upstream.tbe import set_steps

_CHUNK = 1 << 16  # rows read or written at a time


class CachedTableBatchedEmbeddingBags(nn.Module):
    """FBGEMM's training TBE over the slots of a cache, with every table's rows in a quantized backing store.

    Before a lookup in training :meth:`prefetch` moves the batch's rows into slots; without it the forward does. What
    always holds:

    - A row is in at most one slot, of its set or of the spill area. If it is in one, the slot has its value and its
      optimizer state; else the store has.
    - A slot that is not dirty holds what the store holds, so it may be forgotten. Only a dirty row is written back, and
      only when it leaves its slot, or by :meth:`flush`.
    - A row that a batch in flight looks up, from its prefetch to its backward, keeps its slot. A batch is in flight
      until its gradient comes, or until its graph is dropped.
    - In eval mode, or without gradients, a lookup changes nothing: no row, slot, counter or iteration.

    Each table has a cache of its own, so that with a cache as large as the table the result is bit-equal to that of a
    TBE with one table each, up to the rows' first rounding to the store.

    Args:
        tables (Sequence[CachedTableSpec]): the TBE's tables.
        feature_table_map (Optional[List[int]]): the table of each feature, ascending; by default one feature a table.
        pooling_mode (PoolingMode): as FBGEMM's.
        device (Optional[torch.device]): of slots and lookups.
        bounds_check_mode (BoundsCheckMode): FATAL and NONE raise IndexError for an id outside its table, before
            anything changes; WARNING and IGNORE look up row 0 instead.
        fused_params: the rest of FBGEMM's arguments, optimizer, learning_rate and so on.

    Raises:
        ValueError: if there are no tables, ``feature_table_map`` is not ascending or leaves a table out, or the tables'
            configs do not go together.
        NotImplementedError: for an optimizer that changes more than the rows of the batch and their state, or weights
            other than FP32.

    Example::

        tbe = CachedTableBatchedEmbeddingBags(
            [CachedTableSpec("t", 1000, 16, CacheConfig(bits=4, load_factor=0.1))],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=0.02,
        )
        tbe.init_embedding_weights_uniform(-0.01, 0.01)
        pooled = tbe(torch.tensor([1, 5, 7]), torch.tensor([0, 2, 3]))    # [2, 16]
        pooled.sum().backward()                                           # updates rows 1, 5 and 7
    """

    def __init__(
        self,
        tables: Sequence[CachedTableSpec],
        feature_table_map: list[int] | None = None,
        pooling_mode: PoolingMode = PoolingMode.SUM,
        device: torch.device | None = None,
        bounds_check_mode: BoundsCheckMode = BoundsCheckMode.WARNING,
        **fused_params: Any,
    ) -> None:
        super().__init__()
        self.tables = list(tables)
        self.feature_table_map = list(range(len(tables))) if feature_table_map is None else list(feature_table_map)
        self.pooling_mode = pooling_mode
        self.current_device = torch.device(device or "cpu")
        self.bounds_check_mode = bounds_check_mode
        if not self.tables or sorted(set(self.feature_table_map)) != list(range(len(self.tables))):
            raise ValueError(f"{len(self.tables)} tables need a feature each, got tables {self.feature_table_map}")
        if self.feature_table_map != sorted(self.feature_table_map):
            raise ValueError(f"the features of a table must be neighbours, got tables {self.feature_table_map}")
        self.num_sets = [table.config.num_sets(table.rows) for table in self.tables]
        self._slots = SlotTBE(
            self.tables, self.num_sets, self.feature_table_map, pooling_mode, self.current_device, fused_params
        )
        self._rows = CachedRows(self.tables, self.num_sets, self._slots, self.current_device, bounds_check_mode)
        self._in_flight = BatchesInFlight()

    # What TorchRec and FBGEMM ask a TBE for.

    @property
    def optimizer(self) -> EmbOptimType:
        """The fused optimizer."""
        return self._slots.optimizer

    @property
    def iter(self) -> Tensor:
        """Training lookups so far, int64 [1]; FBGEMM counts them for optimizers with state only."""
        steps: Tensor = self._slots.tbe.iter
        return steps

    def set_learning_rate(self, lr: float) -> None:
        """Of the fused optimizer."""
        self._slots.tbe.set_learning_rate(lr)

    def get_learning_rate(self) -> float:
        """Of the fused optimizer."""
        return float(self._slots.tbe.get_learning_rate())

    def set_optimizer_step(self, step: int) -> None:
        """Of the fused optimizer."""
        set_steps(self._slots.tbe, step)

    def prefetch(
        self,
        indices: Tensor,
        offsets: Tensor,
        forward_stream: Any = None,
        batch_size_per_feature_per_rank: list[list[int]] | None = None,
    ) -> None:
        """Move the rows of a batch that is to be looked up into slots; arguments as FBGEMM's ``prefetch``.

        Several batches may be prefetched, to be looked up in the same order; a lookup passes over those before its
        batch, and does without if its batch is not among them. Where the spill area would have to grow while another
        batch waits for its backward, nothing happens, and the lookup moves the rows.

        Raises:
            IndexError: for an id outside its table, with bounds check mode FATAL or NONE.
            ValueError: if the offsets do not fit the ids.
        """
        if not self.training:
            return
        if forward_stream is not None:
            # Rows of earlier batches are written back after their update.
            torch.cuda.current_stream(self.current_device).wait_stream(forward_stream)
        bags = self._bags_per_feature(offsets, batch_size_per_feature_per_rank)
        per_table = ids_per_table(indices, offsets, bags, self.feature_table_map, self.tables)
        slots = self._take_slots(indices, per_table, dirty=False)
        if slots is None:
            return
        if forward_stream is not None:
            slots.record_stream(forward_stream)
        self._in_flight.prefetched.append(
            PrefetchedBatch(indices, offsets, versions(indices, offsets), slots, per_table, self._in_flight.last)
        )

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        feature_requires_grad: Tensor | None = None,
        batch_size_per_feature_per_rank: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Pooled embeddings; arguments and result as FBGEMM's TBE.

        Raises:
            IndexError: for an id outside its table, with bounds check mode FATAL or NONE.
            ValueError: if offsets or weights do not fit the ids.
            RuntimeError: if the spill area would have to grow while another batch waits for its backward.
        """
        bags = self._bags_per_feature(offsets, batch_size_per_feature_per_rank)
        if per_sample_weights is not None and per_sample_weights.shape != indices.shape:
            raise ValueError(
                f"tables {self._names()}: {len(indices)} ids come with per_sample_weights "
                f"{list(per_sample_weights.shape)}"
            )
        if not (self.training and torch.is_grad_enabled()):
            return self._read_only(indices, offsets, per_sample_weights, bags, batch_size_per_feature_per_rank)
        slots, batch = self.slots(indices, offsets, bags)
        with self.ended_by_an_error(batch):
            output = self._slots(
                slots, offsets, per_sample_weights, feature_requires_grad, batch_size_per_feature_per_rank, **kwargs
            )
            return self._in_flight.until_backward(output, batch)

    def slots(self, indices: Tensor, offsets: Tensor, bags_per_feature: Sequence[int]) -> tuple[Tensor, int]:
        """The slots of a batch to be looked up in training, [N], and the batch's number. Raises as :meth:`forward`.

        For lookups in another way than FBGEMM's, in :attr:`slot_tbe`. The batch is in flight from here on, and its rows
        stay: hand the output to :meth:`until_backward`.
        """
        if prefetched := self._in_flight.take_prefetched(indices, offsets):
            self._rows.mark_dirty(prefetched.slots, prefetched.per_table)
            return prefetched.slots, prefetched.number
        per_table = ids_per_table(indices, offsets, bags_per_feature, self.feature_table_map, self.tables)
        slots = self._take_slots(indices, per_table, dirty=True)
        if slots is None:
            raise RuntimeError(
                f"tables {self._names()}: the spill area of a cache has to grow to {self._rows.wanted_spill} rows, "
                "which it cannot while another forward waits for its backward; set spill_rows in CacheConfig to as "
                "many, or drop the other forward's output"
            )
        return slots, self._in_flight.last

    @contextmanager
    def ended_by_an_error(self, batch: int) -> Iterator[None]:
        """A batch of :meth:`slots` that is in flight no more if its lookup, in this block, raises."""
        try:
            yield
        except BaseException:
            self._in_flight.end(batch)
            raise

    @property
    def slot_tbe(self) -> SplitTableBatchedEmbeddingBagsCodegen:
        """FBGEMM's TBE of the slots; another one after the spill area has grown."""
        return self._slots.tbe

    def until_backward(self, output: Tensor, batch: int) -> Tensor:
        """``output`` of a lookup of :meth:`slots`, whose batch is in flight until its gradient comes."""
        return self._in_flight.until_backward(output, batch)

    def split_embedding_weights(self) -> list[Tensor]:
        """Float32 [0, dim] for each table: no table is there as a whole, to be initialized or saved."""
        return [torch.empty(0, table.dim, device=self.current_device) for table in self.tables]

    def init_embedding_weights_uniform(self, min_val: float, max_val: float) -> None:
        """Initialize all rows. Raises as :meth:`write_rows`."""
        for t, table in enumerate(self.tables):
            for first in range(0, table.rows, _CHUNK):
                rows = min(_CHUNK, table.rows - first)
                values = torch.empty(rows, table.dim, device=self.current_device).uniform_(min_val, max_val)
                self.write_rows(t, first, values)

    # Rows from and to the store.

    def read_rows(self, table: int, first: int, rows: int) -> Tensor:
        """Values of neighbouring rows as they are now, float32 [rows, dim].

        Raises:
            IndexError: if there are no such rows.
        """
        self._check_range(table, first, rows)
        chunks = torch.arange(first, first + rows, device=self.current_device).split(_CHUNK)
        return torch.cat([self._rows.current(table, chunk) for chunk in chunks])

    def read_distinct_rows(self, table: int, rows: Tensor) -> Tensor:
        """Values of some distinct rows, int64 [n], as they are now, float32 [n, dim].

        Raises:
            IndexError: if there is no such row.
        """
        if len(rows):
            first, last = int(rows.min()), int(rows.max())
            self._check_range(table, first, last - first + 1)
        chunks = rows.to(self.current_device).split(_CHUNK)
        return torch.cat([self._rows.current(table, chunk) for chunk in chunks])

    def write_rows(self, table: int, first: int, values: Tensor) -> None:
        """Set neighbouring rows, float32 [rows, dim], and clear their optimizer state; cached copies are dropped.

        Raises:
            IndexError: if there are no such rows.
            ValueError: if they have another number of columns.
            RuntimeError: while a batch waits for its backward.
        """
        self._check_range(table, first, len(values))
        dim = self.tables[table].dim
        if values.dim() != 2 or values.shape[1] != dim:
            raise ValueError(f"table {self.tables[table].name} has {dim} columns, got rows {list(values.shape)}")
        self._refuse_in_flight()
        values = values.to(self.current_device, torch.float32).contiguous()
        self._rows.set_rows(table, first, values, self._in_flight.last)

    def flush(self) -> None:
        """Write every dirty row back to the store and empty the cache.

        After it training goes on from the store alone, as it would from a checkpoint of the store. Rows of batches that
        wait for their backward are written as they are, and stay. Batches that were prefetched have to find their rows
        again.
        """
        self._in_flight.drop_prefetched()
        self._in_flight.forbid_repeats()
        oldest = self._in_flight.oldest()
        if self._rows.write_dirty(self._in_flight.last + 1):
            self._in_flight.last += 1  # the random numbers of this number are used up
        self._rows.forget_before(oldest)
        if self.current_device.type == "cuda":  # the store in host memory is read by the host next
            torch.cuda.current_stream(self.current_device).synchronize()

    def reset_cache_states(self) -> None:
        """Drop all cached rows without writing them back, as after the store was loaded.

        Raises:
            RuntimeError: while a batch waits for its backward.
        """
        self._refuse_in_flight()
        self._rows.forget_all()

    def stores(self) -> list[BackingStore]:
        """Every table's rows, quantized; up to date after :meth:`flush` only."""
        return self._rows.stores

    def stored_states(self, table: int) -> list[tuple[int, str]]:
        """Elements a row of each optimizer state, and how the store holds them, a key of ``STATE_BYTES``."""
        return self._rows.stored_states[table]

    @property
    def waits_for_backward(self) -> bool:
        """Whether a batch was looked up and waits for its backward, so that rows cannot be set."""
        return self._in_flight.waits_for_backward()

    def checkpoint_tensors(self, table: int) -> dict[str, Tensor]:
        """What a table is, after :meth:`flush`: training goes on from these bit for bit.

        They are the table's own tensors. To load a checkpoint, overwrite them in place, for every table, and call
        :meth:`checkpoint_loaded`. Beside them the fused optimizer has its iteration and learning rate.

        Returns:
            Dict[str, Tensor]: ``rows4`` uint8 [n4, bytes of a row] and ``rows8`` uint8 [n8, bytes of a row], the
            store's rows of either width; ``row_counts`` uint8 [rows] with LFU, else [0]; ``progress`` int64 [7], the
            number of the last batch, as of this call, then the six counters of :class:`CacheStatistics`.
        """
        self._rows.check_whole()
        self._rows.progress[table][0] = self._in_flight.last
        store = self._rows.stores[table]
        return {
            "rows4": store.rows4,
            "rows8": store.rows8,
            "row_counts": self._rows.directories[table].row_counts,
            "progress": self._rows.progress[table],
        }

    def checkpoint_loaded(self) -> None:
        """Go on from overwritten :meth:`checkpoint_tensors`: drops cached rows and takes over the batch number.

        If the tables come from checkpoints of different TBEs the number is the highest of theirs.

        Raises:
            RuntimeError: while a batch waits for its backward.
        """
        self.reset_cache_states()
        self._in_flight.last = max(int(progress[0]) for progress in self._rows.progress)

    # What the cache counts.

    def cache_statistics(self) -> list[CacheStatistics]:
        """Counters of every table's cache."""
        return [CacheStatistics.of(directory.statistics) for directory in self._rows.directories]

    def lookup_counts(self, table: int) -> Tensor:
        """How often each row was looked up, int64 [rows], as LFU estimates it: recent lookups count more.

        Raises:
            ValueError: if the table's cache is not LFU.
        """
        directory = self._rows.directories[table]
        if not directory.is_lfu:
            raise ValueError(f"table {self.tables[table].name} has an LRU cache, which counts no rows")
        counts = decode_counts(directory.row_counts)
        held = directory.slot_rows >= 0
        counts[directory.slot_rows[held].long()] = decode_counts(directory.slot_counts[held])
        return counts

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of store, cache (rows in slots), spill, optimizer_state (of slots) and directory.

        That is all but the ids, offsets and slots of the last batch and of prefetched ones, and what FBGEMM keeps for a
        TBE of any size, below 200 bytes a table and 1 KB.
        """
        return self._rows.bytes_by_kind()

    def _take_slots(self, indices: Tensor, per_table: list[int], *, dirty: bool) -> Tensor | None:
        """The slots of a batch's ids; the batch is in flight then."""
        batch = self._in_flight.last + 1
        self._in_flight.forbid_repeats()  # the slots may be others' after this, even if it raises
        slots = self._rows.take_slots(indices, per_table, batch, self._in_flight.oldest(), dirty=dirty)
        if slots is not None:
            self._in_flight.start(batch)
        return slots

    def _read_only(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
        bags_per_feature: Sequence[int],
        bags_per_rank: list[list[int]] | None,
    ) -> Tensor:
        per_table = ids_per_table(indices, offsets, bags_per_feature, self.feature_table_map, self.tables)
        return look_up(
            self._rows.current,
            within_tables(indices, per_table, self.tables, self.bounds_check_mode),
            offsets,
            bags_per_feature,
            self.feature_table_map,
            self.pooling_mode,
            per_sample_weights,
            bags_per_rank,
        ).to(self._slots.output_dtype)

    def _bags_per_feature(self, offsets: Tensor, bags_per_rank: list[list[int]] | None) -> list[int]:
        if bags_per_rank is not None:
            return [sum(of_ranks) for of_ranks in bags_per_rank]
        features = len(self.feature_table_map)
        return [(len(offsets) - 1) // features] * features

    def _check_range(self, table: int, first: int, rows: int) -> None:
        spec = self.tables[table]
        if not 0 <= first <= first + rows <= spec.rows:
            raise IndexError(f"table {spec.name} has {spec.rows} rows here, got {rows} from {first}")

    def _refuse_in_flight(self) -> None:
        self._in_flight.drop_prefetched()
        if self._in_flight:
            raise RuntimeError(f"tables {self._names()}: rows cannot be set between a forward and its backward")
        self._in_flight.forbid_repeats()

    def _names(self) -> str:
        return ", ".join(table.name for table in self.tables)
