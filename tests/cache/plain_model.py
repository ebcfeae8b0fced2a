"""What a cached TBE must compute, without a cache: plain FBGEMM, and stores that the reference ops write."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.ops.cache_tensors import WAYS
from torchrec_mpe.ops.reference import stored_rows as reference
from torchrec_mpe.ops.reference.lookup_counts import decode_counts

Write = tuple[int, Tensor, int]  # table, rows, batch number


def plain_tbe(
    tables: Sequence[tuple[int, int]], feature_table_map: list[int] | None = None, **fused_params: Any
) -> SplitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM's TBE of tables of some rows and columns."""
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in tables],
        feature_table_map=feature_table_map,
        **fused_params,
    )


def states_of(tbe: SplitTableBatchedEmbeddingBagsCodegen) -> list[list[Tensor]]:
    """Optimizer states by table, [rows, elements]."""
    if tbe.optimizer == EmbOptimType.EXACT_SGD:
        return [[] for _ in tbe.split_embedding_weights()]
    return [[state.data.view(len(state), -1) for state in of_table] for of_table in tbe.split_optimizer_states()]


class PlainModel:
    """Rows as they have to be, of a cached TBE that starts with nothing in its cache.

    It learns from the cached TBE which rows are written and which are in slots, and nothing of their values: those are
    a plain TBE's, rounded by the reference when a row is written, and taken back from there when it has left.
    """

    def __init__(self, cached: CachedTableBatchedEmbeddingBags, **fused_params: Any) -> None:
        self.tables = cached.tables
        self.tbe = plain_tbe([(t.rows, t.dim) for t in self.tables], list(cached.feature_table_map), **fused_params)
        self.values = [values.data for values in self.tbe.split_embedding_weights()]
        self.states = states_of(self.tbe)
        self.dtypes = cached._rows._state_dtypes
        self.seeds = [table.config.table_seed(table.name) for table in self.tables]
        self.stores = [type(store)(*(tensor.clone() for tensor in store)) for store in cached.stores()]
        self.in_slots: list[set[int]] = [set() for _ in self.tables]
        self.dirty: list[set[int]] = [set() for _ in self.tables]
        self.counts: list[Counter[int]] = [Counter() for _ in self.tables]
        self.last_write: dict[tuple[int, int], int] = {}
        for t in range(len(self.tables)):
            self.take_from_store(t, list(range(self.tables[t].rows)))

    def looked_up(self, ids: Tensor, offsets: Tensor) -> list[Tensor]:
        """A batch's ids by table."""
        features = self.tbe.feature_table_map
        bags = (len(offsets) - 1) // len(features)
        parts: list[list[Tensor]] = [[] for _ in self.tables]
        for f, t in enumerate(features):
            parts[t].append(ids[offsets[f * bags] : offsets[(f + 1) * bags]])
        return [torch.cat(of_table) for of_table in parts]

    def count(self, ids: Tensor, offsets: Tensor) -> None:
        for counts, of_table in zip(self.counts, self.looked_up(ids, offsets), strict=True):
            counts.update(of_table.tolist())

    def about_to_update(self, ids: Tensor, offsets: Tensor) -> None:
        for dirty, of_table in zip(self.dirty, self.looked_up(ids, offsets), strict=True):
            dirty.update(of_table.tolist())

    def write(self, t: int, rows: Tensor, batch: int) -> None:
        """What the store has to hold after these rows were written."""
        table, numbers = self.tables[t], rows.int()
        reference.write_stored_rows_(
            [self.stores[t]],
            [self.values[t]],
            [self.states[t]],
            [(numbers, numbers)],
            self.dtypes,
            batch,
            [self.seeds[t]],
            [table.first_row],
            [table.first_column],
            table.config.stochastic_rounding,
        )

    def take_from_store(self, t: int, rows: list[int]) -> None:
        numbers = torch.tensor(rows, dtype=torch.int32)
        reference.read_stored_rows_(
            [self.stores[t]], [self.values[t]], [self.states[t]], [(numbers, numbers)], self.dtypes
        )

    def follow(self, cached: CachedTableBatchedEmbeddingBags, writes: list[Write]) -> None:
        """Take over which rows were written since the last call and which are in slots, and check that it may be so."""
        written: list[set[int]] = [set() for _ in self.tables]
        for t, rows, batch in writes:
            numbers = rows.tolist()
            assert len(set(numbers)) == len(numbers)
            assert set(numbers) <= self.dirty[t], "a clean row was written"
            for row in numbers:
                assert batch > self.last_write.get((t, row), -1), "the same random numbers again"
                self.last_write[t, row] = batch
            written[t].update(numbers)
            self.write(t, rows, batch)
        for t, directory in enumerate(cached._rows.directories):
            now = set(directory.slot_rows[directory.slot_rows >= 0].tolist())
            left = sorted(self.in_slots[t] - now)
            assert {row for row in left if row in self.dirty[t]} <= written[t], "an update was lost"
            clean = [row for row in left if row not in self.dirty[t]]
            before = self.values[t][clean].clone()
            self.take_from_store(t, left)
            assert torch.equal(self.values[t][clean], before), "a clean row is not what the store holds"
            self.in_slots[t] = now
            self.dirty[t].difference_update(left)

    def check(self, cached: CachedTableBatchedEmbeddingBags) -> None:
        """Every row, stored row and optimizer state, bit for bit, and the directories."""
        for t, (table, directory) in enumerate(zip(cached.tables, cached._rows.directories, strict=True)):
            store, expected = cached.stores()[t], self.stores[t]
            assert torch.equal(store.rows4, expected.rows4) and torch.equal(store.rows8, expected.rows8)
            assert torch.equal(cached.read_rows(t, 0, table.rows), self.values[t])
            held = (directory.slot_rows >= 0).nonzero().squeeze(1)
            rows = directory.slot_rows[held].long()
            assert torch.equal(cached._slots.values[t][held], self.values[t][rows])
            for state, model in zip(cached._slots.states[t], self.states[t], strict=True):
                assert torch.equal(state[held], model[rows])
            assert set(rows[directory.slot_dirty[held] == 1].tolist()) == self.dirty[t]
            self._check_directory(cached, t, held, rows)

    def _check_directory(self, cached: CachedTableBatchedEmbeddingBags, t: int, held: Tensor, rows: Tensor) -> None:
        directory, sets = cached._rows.directories[t], cached.num_sets[t]
        assert len(directory.slot_rows) == len(cached._slots.values[t]) == WAYS * sets + cached._slots.spill[t]
        assert len(set(rows.tolist())) == len(rows), "a row is in two slots"
        in_set = held < WAYS * sets
        assert torch.equal(held[in_set] // WAYS, rows[in_set] % sets), "a row is in another's set"
        empty = directory.slot_rows < 0
        assert not directory.slot_dirty[empty].any()
        counts = self.counts[t]
        assert cached.cache_statistics()[t].num_requested_indices == counts.total()
        if directory.is_lfu:
            assert not directory.slot_counts[empty].any()
            for row, count in enumerate(cached.lookup_counts(t).tolist()):
                # Exact to 32, and some were counted in several steps, each rounded to a sixteenth.
                assert count == counts[row] if counts[row] <= 32 else abs(count - counts[row]) <= counts[row] / 4 + 1
            assert decode_counts(directory.row_counts).max() <= max(counts.values(), default=0) * 1.25 + 1
