"""A cached TBE against a plain one, through everything that can happen to it in any order."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from tests.cache.plain_model import PlainModel, Write
from torchrec_mpe.cache import cached_rows
from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.table_spec import CachedTableSpec
from torchrec_mpe.ops.cache_slots import assign_cache_slots_
from torchrec_mpe.ops.stored_rows import read_stored_rows_, write_stored_rows_

FUSED = {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": 0.1}
ROWS = (300, 60)
MAPS = [0, 0, 1]
SETTINGS = settings(
    max_examples=20,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    report_multiple_bugs=False,
    database=None,
    phases=[Phase.generate],  # to find; add Phase.shrink to understand
    suppress_health_check=list(HealthCheck),
)

batches = st.tuples(st.sampled_from([0, 1, 4, 40, 120]), st.integers(1, 3), st.integers(0, 2**32 - 1))


def batch_of(size: int, bags: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids of three features and their offsets: some rows often, bags of any length."""
    g = torch.Generator().manual_seed(seed)
    parts, lengths = [], []
    for t in MAPS:
        n = int(torch.randint(size + 1, (), generator=g))
        span = ROWS[t] if seed % 3 else 20
        parts.append(torch.randint(span, (n,), generator=g))
        cuts = torch.randint(n + 1, (bags - 1,), generator=g).sort().values
        lengths.append(torch.cat([torch.tensor([0]), cuts, torch.tensor([n])]).diff())
    offsets = torch.cat([torch.tensor([0]), torch.cat(lengths).cumsum(0)])
    return torch.cat(parts), offsets


class CacheMachine(RuleBasedStateMachine):
    """Rules are what a program may do with a cached TBE; after each, every bit of it is compared."""

    algorithm = CacheAlgorithm.LRU
    write: Callable[..., None] = staticmethod(write_stored_rows_)

    def __init__(self) -> None:
        super().__init__()
        cached_rows.write_stored_rows_ = self.spy
        self.writes: list[Write] = []
        self.cached = self.make()
        self.model = PlainModel(self.cached, **FUSED)
        self.waiting: list[tuple[Tensor, Tensor]] = []  # outputs before their backward: the cached TBE's, the model's
        self.prefetched: list[tuple[Tensor, Tensor, bool]] = []  # ids, offsets, whether rows are in slots
        self.checkpoint: Any = None

    def make(self) -> CachedTableBatchedEmbeddingBags:
        g = torch.Generator().manual_seed(0)
        config = {"algorithm": self.algorithm, "half_life": float("inf"), "seed": 3, "optimizer_state_dtype": "bf16"}
        return CachedTableBatchedEmbeddingBags(
            [
                CachedTableSpec("a", ROWS[0], 8, CacheConfig(8, 0.2, **config), torch.rand(300, generator=g) < 0.5, 7),
                CachedTableSpec("b", ROWS[1], 4, CacheConfig(4, 0.2, spill_rows=5, **config)),
            ],
            MAPS,
            **FUSED,
        )

    @initialize(seed=st.integers(0, 100))
    def set_all_rows(self, seed: int) -> None:
        torch.manual_seed(seed)
        for t, rows in enumerate(ROWS):
            self.set_rows(t, 0, rows)

    def set_rows(self, t: int, first: int, rows: int) -> None:
        values = torch.randn(rows, self.cached.tables[t].dim) * 0.1
        self.cached.write_rows(t, first, values)
        self.forget_prefetched()
        numbers = list(range(first, first + rows))
        self.model.values[t][numbers] = values
        for state in self.model.states[t]:
            state[numbers] = 0
        for _, written, batch in self.taken_writes():
            assert written.tolist() == numbers
            self.model.write(t, written, batch)
        self.model.take_from_store(t, numbers)
        self.model.in_slots[t].difference_update(numbers)
        self.model.dirty[t].difference_update(numbers)

    def forget_prefetched(self) -> None:
        self.prefetched = [(ids, offsets, False) for ids, offsets, _ in self.prefetched]

    def forward(self, ids: Tensor, offsets: Tensor, *, has_slots: bool = False) -> bool:
        try:
            output = self.cached(ids, offsets)
        except RuntimeError as error:
            assert "spill_rows" in str(error) and (self.waiting or has_slots)
            self.forget_prefetched()
            return False
        if not has_slots:
            self.model.count(ids, offsets)
        self.model.about_to_update(ids, offsets)
        self.model.follow(self.cached, self.taken_writes())
        expected = self.model.tbe(ids, offsets)
        assert torch.equal(output, expected)
        self.waiting.append((output, expected))
        return True

    def taken_writes(self) -> list[Write]:
        writes, self.writes = self.writes, []
        return writes

    def backward(self, which: int, seed: int) -> None:
        output, expected = self.waiting.pop(which)
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
        output.backward(gradient)
        expected.backward(gradient)

    @rule(several=st.lists(batches, min_size=1, max_size=6), seed=st.integers(0, 99))
    def train(self, several: list[tuple[int, int, int]], seed: int) -> None:
        for batch in several:
            if self.forward(*batch_of(*batch)):
                self.backward(-1, seed)
            self.same_bits()
        self.forget_prefetched()

    @rule(batch=batches)
    @precondition(lambda self: len(self.waiting) < 2)
    def forward_that_waits(self, batch: tuple[int, int, int]) -> None:
        self.forward(*batch_of(*batch))
        self.forget_prefetched()

    @rule(which=st.sampled_from([0, -1]), seed=st.integers(0, 99))
    @precondition(lambda self: self.waiting)
    def backward_of_waiting(self, which: int, seed: int) -> None:
        self.backward(which, seed)

    @rule(which=st.sampled_from([0, -1]))
    @precondition(lambda self: self.waiting)
    def drop_graph(self, which: int) -> None:
        self.waiting.pop(which)

    @rule(batch=batches)
    @precondition(lambda self: len(self.prefetched) < 2)
    def prefetch(self, batch: tuple[int, int, int]) -> None:
        ids, offsets = batch_of(*batch)
        before = len(self.cached._in_flight.prefetched)
        self.cached.prefetch(ids, offsets)
        done = len(self.cached._in_flight.prefetched) > before
        assert done or self.waiting or before
        if done:
            self.model.count(ids, offsets)
        self.model.follow(self.cached, self.taken_writes())
        self.prefetched.append((ids, offsets, done))

    @rule(seed=st.integers(0, 99), copied=st.booleans())
    @precondition(lambda self: self.prefetched)
    def train_prefetched(self, seed: int, copied: bool) -> None:
        ids, offsets, done = self.prefetched.pop(0)
        if copied:
            ids = ids.clone()
        if not done:
            self.forget_prefetched()
        if self.forward(ids, offsets, has_slots=done):
            self.backward(-1, seed)

    @rule(batch=batches, gradients=st.booleans())
    def evaluate(self, batch: tuple[int, int, int], gradients: bool) -> None:
        ids, offsets = batch_of(*batch)
        before = [[tensor.clone() for tensor in directory] for directory in self.cached._rows.directories]
        steps = self.cached.iter.clone()
        self.cached.train(not gradients)
        with torch.set_grad_enabled(gradients):
            output = self.cached(ids, offsets)
        self.cached.train()
        assert not output.requires_grad and not self.writes and torch.equal(self.cached.iter, steps)
        for directory, tensors in zip(self.cached._rows.directories, before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(directory, tensors, strict=True))
        with torch.no_grad():
            torch.testing.assert_close(output, self.model.tbe(ids, offsets), rtol=1e-5, atol=1e-6)

    @rule()
    def flush(self) -> None:
        self.cached.flush()
        self.forget_prefetched()
        self.model.follow(self.cached, self.taken_writes())
        assert self.waiting or not any(self.model.in_slots)

    @rule()
    def save(self) -> None:
        self.flush()
        tensors = [{k: v.clone() for k, v in self.cached.checkpoint_tensors(t).items()} for t in range(2)]
        self.checkpoint = tensors, copy.deepcopy(self.model.counts)

    @rule(restart=st.booleans())
    @precondition(lambda self: self.checkpoint)
    def crash(self, restart: bool) -> None:
        tensors, counts = self.checkpoint
        self.waiting, self.prefetched = [], []
        if restart:
            self.cached = self.make()
        for t, of_table in enumerate(tensors):
            live = self.cached.checkpoint_tensors(t)
            assert live.keys() == of_table.keys()
            for name, tensor in of_table.items():
                live[name].copy_(tensor)
        self.cached.checkpoint_loaded()
        self.model = PlainModel(self.cached, **FUSED)
        self.model.counts = copy.deepcopy(counts)

    @rule()
    def copy_module(self) -> None:
        self.cached = copy.deepcopy(self.cached)
        self.waiting = []
        self.forget_prefetched()

    @rule(t=st.sampled_from([0, 1]), first=st.integers(0, 50), rows=st.integers(0, 10))
    @precondition(lambda self: not self.waiting)
    def write_rows(self, t: int, first: int, rows: int) -> None:
        self.set_rows(t, first, rows)

    @invariant()
    def same_bits(self) -> None:
        assert not self.writes
        self.model.check(self.cached)

    def spy(self, stores: Any, values: Any, states: Any, moves: Any, dtypes: Any, batch: int, *rest: Any) -> None:
        for store, (_, rows) in zip(stores, moves, strict=True):
            t = next(t for t, ours in enumerate(self.cached.stores()) if ours is store)
            if len(rows):
                self.writes.append((t, rows.clone(), batch))
        self.write(stores, values, states, moves, dtypes, batch, *rest)

    def teardown(self) -> None:
        cached_rows.write_stored_rows_ = write_stored_rows_


class LFUMachine(CacheMachine):
    algorithm = CacheAlgorithm.LFU


@pytest.mark.parametrize("machine", [CacheMachine, LFUMachine])
def test_it_computes_what_a_plain_tbe_does(machine: type[CacheMachine]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)  # type: ignore[no-untyped-call]


def assign_without_lock(*arguments: Any) -> Any:
    *others, batch, _, dirty = arguments
    return assign_cache_slots_(*others, batch, batch, dirty)


def assign_without_dirt(*arguments: Any) -> Any:
    return assign_cache_slots_(*arguments[:-1], False)


def write_without_the_last(stores: Any, values: Any, states: Any, moves: Any, *rest: Any) -> None:
    moves = [(slots[:-1], rows[:-1]) if 1 < len(rows) < 60 else (slots, rows) for slots, rows in moves]
    write_stored_rows_(stores, values, states, moves, *rest)


def read_of_another_row(stores: Any, values: Any, states: Any, moves: Any, *rest: Any) -> None:
    moves = [(slots, (rows // 2 * 2).int()) for slots, rows in moves]
    read_stored_rows_(stores, values, states, moves, *rest)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("assign_cache_slots_", assign_without_lock),
        ("assign_cache_slots_", assign_without_dirt),
        ("write_stored_rows_", write_without_the_last),
        ("read_stored_rows_", read_of_another_row),
    ],
)
def test_the_machine_sees_what_is_broken(
    name: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "write_stored_rows_":
        monkeypatch.setattr(CacheMachine, "write", staticmethod(broken))
    else:
        monkeypatch.setattr(cached_rows, name, broken)
    # The smallest run that shows it would take half a minute to find, and nobody to read it.
    until_seen = settings(SETTINGS, max_examples=500, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(CacheMachine, settings=until_seen)  # type: ignore[no-untyped-call]
