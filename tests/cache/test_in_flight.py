"""Which rows may not move: those of batches that wait for their lookup or their backward."""

import copy
import gc
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor

from torchrec_mpe.cache import cached_rows
from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.in_flight import BatchesInFlight, PrefetchedBatch, versions
from torchrec_mpe.cache.slot_tbe import SlotTBE
from torchrec_mpe.cache.table_spec import CachedTableSpec
from torchrec_mpe.ops.backends import use_backend

ROWS = 200


def make(spill_rows: int = 0, **fused: Any) -> CachedTableBatchedEmbeddingBags:
    """One table, a cache of one set."""
    config = CacheConfig(8, 0.1, spill_rows=spill_rows)
    fused = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 1.0, **fused}
    cached = CachedTableBatchedEmbeddingBags([CachedTableSpec("t", ROWS, 4, config)], **fused)
    torch.manual_seed(0)
    cached.init_embedding_weights_uniform(-1, 1)
    return cached


def bag(first: int, last: int) -> tuple[Tensor, Tensor]:
    return torch.arange(first, last), torch.tensor([0, last - first])


def rows_in_slots(cached: CachedTableBatchedEmbeddingBags) -> set[int]:
    tags = cached._rows.directories[0].slot_rows
    return set(tags[tags >= 0].tolist())


def test_a_row_that_waits_for_its_backward_stays() -> None:
    cached = make(spill_rows=32)
    before = cached.read_rows(0, 0, 32)
    waiting = cached(*bag(0, 32))
    cached(*bag(32, 64)).sum().backward()  # finds no slot in the set
    assert rows_in_slots(cached) == set(range(64))
    waiting.sum().backward()
    assert torch.equal(cached.read_rows(0, 0, 32), before - 1)
    cached(*bag(64, 96)).sum().backward()
    assert rows_in_slots(cached) == set(range(64, 96))  # the spilled rows went back too


def test_rows_may_move_before_the_backward_of_others() -> None:
    """Autograd does not take it for a change of what that backward needs, also where ops are plain PyTorch."""
    with use_backend("reference"):
        cached = make(spill_rows=32)
        before = cached.read_rows(0, 0, 3)
        waiting = cached(*bag(0, 3))
        cached.prefetch(*bag(32, 64))
        waiting.sum().backward()
        assert torch.equal(cached.read_rows(0, 0, 3), before - 1)


@pytest.mark.parametrize("by", ["del", "detach", "exception"])
def test_a_dropped_graph_frees_its_rows(by: str) -> None:
    cached = make()
    output = cached(*bag(0, 32))
    assert cached._in_flight
    if by == "detach":
        kept = output.detach()
        del output
        assert len(kept) == 1
    elif by == "del":
        del output
    else:

        def step(loss: Tensor) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            step(cached(*bag(0, 32)))
        del output
    gc.collect()
    assert not cached._in_flight
    cached(*bag(32, 96)).sum().backward()  # room for all, the spill area grows
    assert rows_in_slots(cached) == set(range(32, 96))


def test_output_may_change_in_place() -> None:
    cached = make()
    before = cached.read_rows(0, 0, 3)
    output = cached(*bag(0, 3))
    output.mul_(2)
    output.sum().backward()
    assert not cached._in_flight
    assert torch.equal(cached.read_rows(0, 0, 3), before - 2)


def test_backward_through_some_of_the_outputs() -> None:
    """Gradients of a batch come once, however many losses there are."""
    cached = make()
    before = cached.read_rows(0, 0, 3)
    first, second = cached(*bag(0, 3)), cached(*bag(1, 3))
    (first.sum() + 2 * second.sum()).backward()
    assert not cached._in_flight
    expected = before - torch.tensor([[1.0], [3.0], [3.0]])
    torch.testing.assert_close(cached.read_rows(0, 0, 3), expected)


def test_a_second_backward_through_the_last_lookup() -> None:
    cached = make()
    before = cached.read_rows(0, 0, 3)
    output = cached(*bag(0, 3))
    output.sum().backward(retain_graph=True)
    output.sum().backward()
    torch.testing.assert_close(cached.read_rows(0, 0, 3), before - 2)


@pytest.mark.parametrize("then", ["forward", "prefetch", "flush", "write_rows", "reset", "load"])
def test_a_second_backward_after_rows_moved_is_refused(then: str) -> None:
    cached = make()
    output = cached(*bag(0, 3))
    output.sum().backward(retain_graph=True)
    {
        "forward": lambda: cached(*bag(5, 6)),
        "prefetch": lambda: cached.prefetch(*bag(5, 6)),
        "flush": cached.flush,
        "write_rows": lambda: cached.write_rows(0, 0, torch.zeros(1, 4)),
        "reset": cached.reset_cache_states,
        "load": cached.checkpoint_loaded,
    }[then]()
    before = cached.read_rows(0, 0, ROWS)
    with pytest.raises(RuntimeError, match="second backward through the same lookup"):
        output.sum().backward()
    assert torch.equal(cached.read_rows(0, 0, ROWS), before)


def test_the_spill_area_cannot_grow_under_a_waiting_batch() -> None:
    cached = make()
    waiting = cached(*bag(0, 32))
    with pytest.raises(RuntimeError, match=r"tables t: .* grow to \[9\] rows.*spill_rows in CacheConfig"):
        cached(*bag(30, 41))
    cached.prefetch(*bag(30, 41))  # does nothing
    assert not cached._in_flight.prefetched and cached._in_flight.last == 1
    before = cached.read_rows(0, 0, ROWS)
    waiting.sum().backward()
    cached(*bag(30, 41)).sum().backward()
    after = before.clone()
    after[:32] -= 1
    after[30:41] -= 1
    torch.testing.assert_close(cached.read_rows(0, 0, 41), after[:41], rtol=0, atol=0.02)  # some were rounded
    assert torch.equal(cached.read_rows(0, 30, 11), after[30:41])


def test_the_spill_area_grows_to_what_a_prefetch_wanted() -> None:
    cached = make()
    waiting = cached(*bag(0, 32))
    cached.prefetch(*bag(40, 60))
    waiting.sum().backward()
    cached(*bag(0, 1)).sum().backward()
    assert cached._slots.spill == [20]


def test_prefetched_batches_are_looked_up_in_order() -> None:
    cached = make(spill_rows=40)
    a, b = bag(0, 20), bag(20, 40)
    cached.prefetch(*a)
    cached.prefetch(*b)
    dirty = cached._rows.directories[0].slot_dirty
    assert int(dirty.sum()) == 0
    cached(*a).sum().backward()
    assert int(dirty.sum()) == 20
    cached(*b).sum().backward()
    assert int(dirty.sum()) == 40
    assert cached.cache_statistics()[0].num_calls == 2


def test_a_lookup_passes_over_prefetched_batches() -> None:
    cached = make(spill_rows=40)
    before = cached.read_rows(0, 0, 32)
    a, b = bag(0, 16), bag(16, 32)
    cached.prefetch(*a)
    cached.prefetch(*b)
    cached(*b).sum().backward()
    assert not cached._in_flight
    cached(*a).sum().backward()
    assert torch.equal(cached.read_rows(0, 0, 32), before - 1)


def test_a_refilled_buffer_is_another_batch() -> None:
    cached = make()
    before = cached.read_rows(0, 0, 6)
    ids, offsets = bag(0, 3)
    cached.prefetch(ids, offsets)
    ids += 3
    cached(ids, offsets).sum().backward()
    assert torch.equal(cached.read_rows(0, 0, 6), before - torch.tensor([0.0, 0, 0, 1, 1, 1])[:, None])


def test_a_prefetched_batch_may_be_a_copy() -> None:
    ids, offsets = bag(0, 3)
    prefetched = PrefetchedBatch(ids, offsets, versions(ids, offsets), ids, [3], 1)
    assert prefetched.is_of(ids.clone(), offsets.clone())
    assert not prefetched.is_of(ids.int(), offsets)
    assert not prefetched.is_of(ids, offsets[:1])
    assert not prefetched.is_of(ids + 1, offsets)
    with torch.inference_mode():
        ids, offsets = bag(0, 3)
        assert PrefetchedBatch(ids, offsets, versions(ids, offsets), ids, [3], 1).is_of(ids, offsets)


def test_a_prefetched_batch_that_is_only_evaluated_stays_clean() -> None:
    cached = make()
    stored = cached.stores()[0].rows8.clone()
    cached.prefetch(*bag(0, 20))
    with torch.no_grad():
        cached(*bag(0, 20))
    cached.flush()
    assert torch.equal(cached.stores()[0].rows8, stored) and cached._in_flight.last == 1


def test_flush_with_prefetched_and_waiting_batches() -> None:
    cached = make(spill_rows=64)
    before = cached.read_rows(0, 0, ROWS)
    waiting = cached(*bag(0, 20))
    cached.prefetch(*bag(10, 30))
    cached.prefetch(*bag(30, 40))
    cached.flush()
    assert cached._in_flight and not cached._in_flight.prefetched
    assert set(range(20)) <= rows_in_slots(cached)
    cached.eval()
    cached(*bag(0, 40))
    cached.train()
    waiting.sum().backward()
    after = before.clone()
    after[:20] -= 1
    assert torch.equal(cached.read_rows(0, 0, ROWS), after)
    cached.flush()
    assert not rows_in_slots(cached)
    torch.testing.assert_close(cached.read_rows(0, 0, ROWS), after, rtol=0, atol=0.02)


def test_rows_cannot_be_set_under_a_waiting_batch() -> None:
    cached = make()
    waiting = cached(*bag(0, 20))
    for call in (lambda: cached.write_rows(0, 0, torch.zeros(1, 4)), cached.reset_cache_states):
        with pytest.raises(RuntimeError, match="tables t: rows cannot be set between a forward and its backward"):
            call()
    waiting.sum().backward()
    cached.write_rows(0, 0, torch.zeros(1, 4))


def test_a_copy_has_nothing_in_flight_and_memory_of_its_own() -> None:
    cached = make(spill_rows=40, optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD)
    cached(*bag(0, 20)).sum().backward()
    waiting = cached(*bag(10, 30))
    cached.prefetch(*bag(30, 40))
    copied = copy.deepcopy(cached)
    assert not copied._in_flight and not copied._in_flight.prefetched and cached._in_flight
    values = copied.read_rows(0, 0, ROWS)
    assert torch.equal(values, cached.read_rows(0, 0, ROWS))
    waiting.sum().backward()
    assert torch.equal(copied.read_rows(0, 0, ROWS), values)
    for _ in range(3):
        copied(*bag(10, 30)).sum().backward()
    assert not torch.equal(copied.read_rows(0, 10, 20), values[10:30])
    copied.flush()
    assert copied.checkpoint_tensors(0)["progress"][1:].tolist() == list(vars(copied.cache_statistics()[0]).values())


def test_an_error_in_the_lookup_frees_its_rows() -> None:
    cached = make(output_dtype=SparseType.BF16)  # which FBGEMM has on GPUs only
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="BFloat16"):
            cached(*bag(0, 40))
        assert not cached._in_flight
    cached.prefetch(*bag(0, 40))
    with pytest.raises(NotImplementedError, match="BFloat16"):
        cached(*bag(0, 40))
    assert not cached._in_flight


@pytest.mark.parametrize("failing", ["assign_cache_slots_", "write_stored_rows_", "read_stored_rows_"])
def test_an_interrupt_while_rows_move_is_not_passed_over(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = make()
    cached.flush()
    saved = {name: tensor.clone() for name, tensor in cached.checkpoint_tensors(0).items()}
    cached(*bag(0, 32)).sum().backward()
    with monkeypatch.context() as patch:
        run = getattr(cached_rows, failing)

        def interrupt(*arguments: Any) -> None:
            if failing == "assign_cache_slots_":
                run(*arguments)  # a signal that comes while an op runs is dealt with when it returns
            raise KeyboardInterrupt

        patch.setattr(cached_rows, failing, interrupt)
        with pytest.raises(KeyboardInterrupt):
            cached(*bag(32, 50))
    for call in (
        lambda: cached(*bag(0, 1)),
        lambda: cached.prefetch(*bag(0, 1)),
        lambda: cached.eval()(*bag(0, 1)),
        cached.flush,
        lambda: cached.read_rows(0, 0, 1),
        lambda: cached.checkpoint_tensors(0),
    ):
        cached.train()
        with pytest.raises(RuntimeError, match="tables t: an error or interrupt came while rows moved"):
            call()
    fresh = make()
    for name, tensor in fresh.checkpoint_tensors(0).items():
        tensor.copy_(saved[name])
    fresh.checkpoint_loaded()
    assert torch.equal(fresh.read_rows(0, 0, ROWS), make().read_rows(0, 0, ROWS))


def test_a_failing_growth_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = make()
    cached(*bag(0, 32)).sum().backward()
    before = cached.read_rows(0, 0, ROWS)

    def no_memory(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(SlotTBE, "_make", no_memory)
        with pytest.raises(MemoryError):
            cached(*bag(32, 70))
    assert not cached._in_flight and torch.equal(cached.read_rows(0, 0, ROWS), before)
    cached(*bag(32, 70)).sum().backward()
    before[32:70] -= 1
    assert torch.equal(cached.read_rows(0, 32, 38), before[32:70])


def test_batches_end_once() -> None:
    batches = BatchesInFlight()
    assert not batches and batches.oldest() == 1
    batches.start(1)
    batches.start(4)
    assert batches and batches.oldest() == 1 and batches.last == 4
    batches.end(1)
    batches.end(1)
    assert batches.oldest() == 4
    batches.end(4)
    assert not batches and batches.oldest() == 5


def test_a_lookup_of_one_s_own_that_fails_ends_its_batch() -> None:
    cached = make()
    _, batch = cached.slots(*bag(0, 8), [1])
    with pytest.raises(MemoryError), cached.ended_by_an_error(batch):
        raise MemoryError
    assert not cached._in_flight


def test_no_second_backward_after_a_lookup_that_failed() -> None:
    cached = make(bounds_check_mode=BoundsCheckMode.FATAL)
    output = cached(*bag(0, 8))
    output.sum().backward(retain_graph=True)
    with pytest.raises(IndexError):
        cached(*bag(ROWS - 1, ROWS + 1))
    with pytest.raises(RuntimeError, match="a second backward through the same lookup"):
        output.sum().backward()
