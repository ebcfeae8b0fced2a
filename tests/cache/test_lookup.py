"""Lookups of a cached TBE with a cache as large as its tables: what FBGEMM's own TBE gives and does, bit for bit."""

import copy
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, CacheAlgorithm, PoolingMode
from torch import Tensor

from tests.cache.plain_model import plain_tbe, states_of
from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.table_spec import CachedTableSpec

TABLES = [(1, 8), (500, 8), (70, 16)]
MAPS = [0, 1, 1, 2]
OPTIMIZERS = [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD]


def pair(
    load_factor: float = 1.0,
    algorithm: CacheAlgorithm = CacheAlgorithm.LRU,
    tables: list[tuple[int, int]] = TABLES,
    feature_table_map: list[int] = MAPS,
    bits: Any = 8,
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    bounds_check_mode: BoundsCheckMode = BoundsCheckMode.FATAL,
    **fused: Any,
) -> tuple[CachedTableBatchedEmbeddingBags, Any]:
    """A cached TBE with random rows, and FBGEMM's with the same."""
    config = CacheConfig(bits, load_factor, algorithm)
    specs = [CachedTableSpec(f"t{t}", rows, dim, config) for t, (rows, dim) in enumerate(tables)]
    fused = {"optimizer": optimizer, "learning_rate": 0.05, **fused}
    cached = CachedTableBatchedEmbeddingBags(specs, feature_table_map, bounds_check_mode=bounds_check_mode, **fused)
    torch.manual_seed(0)
    cached.init_embedding_weights_uniform(-0.1, 0.1)
    plain = plain_tbe(tables, feature_table_map, **fused)
    for t, values in enumerate(plain.split_embedding_weights()):
        values.copy_(cached.read_rows(t, 0, len(values)))
    return cached, plain


def batch(seed: int, lengths: list[int] | None = None, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Ids and int64 offsets of MAPS: 6 bags a feature, some of them empty, or of given lengths."""
    g = torch.Generator().manual_seed(seed)
    bags = torch.randint(0, 5, (6 * len(MAPS),), generator=g) if lengths is None else torch.tensor(lengths).long()
    offsets = torch.cat([torch.tensor([0]), bags.cumsum(0)])
    per_feature = bags.view(len(MAPS), -1).sum(1).tolist()
    ids = [torch.randint(TABLES[t][0], (n,), generator=g) for t, n in zip(MAPS, per_feature, strict=True)]
    return torch.cat(ids).to(dtype), offsets


def train_both(cached: Any, plain: Any, ids: Tensor, offsets: Tensor, weights: Tensor | None = None, **k: Any) -> None:
    ours, theirs = (tbe(ids, offsets, None if weights is None else weights, **k) for tbe in (cached, plain))
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    gradient = torch.randn(ours.shape).to(ours.dtype)
    ours.backward(gradient)
    theirs.backward(gradient)


def same_rows(cached: CachedTableBatchedEmbeddingBags, plain: Any) -> None:
    for t, values in enumerate(plain.split_embedding_weights()):
        assert torch.equal(cached.read_rows(t, 0, len(values)), values)
        directory = cached._rows.directories[t]
        held = directory.slot_rows >= 0
        for ours, theirs in zip(cached._slots.states[t], states_of(plain)[t], strict=True):
            assert torch.equal(ours[held], theirs[directory.slot_rows[held].long()])


@pytest.mark.parametrize("algorithm", list(CacheAlgorithm))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer: EmbOptimType, algorithm: CacheAlgorithm) -> None:
    cached, plain = pair(algorithm=algorithm, optimizer=optimizer)
    for step in range(5):
        train_both(cached, plain, *batch(step))
        if step == 2:
            cached.set_learning_rate(0.5)
            plain.set_learning_rate(0.5)
            assert cached.get_learning_rate() == pytest.approx(0.5)
    assert cached.optimizer == optimizer and torch.equal(cached.iter, plain.iter)
    same_rows(cached, plain)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", list(PoolingMode))
@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.int64, torch.int32), (torch.int32, torch.int32)])
def test_pooling(mode: PoolingMode, weighted: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    tables = [(1, 8), (500, 8), (70, 8)] if mode == PoolingMode.NONE else TABLES
    cached, plain = pair(tables=tables, pooling_mode=mode)
    assert cached.pooling_mode == mode
    for step in range(3):
        ids, offsets = batch(step, dtype=dtypes[0])
        weights = torch.rand(len(ids)) if weighted else None
        train_both(cached, plain, ids, offsets.to(dtypes[1]), weights)
    same_rows(cached, plain)
    ids, offsets = batch(9, dtype=dtypes[0])
    weights = torch.rand(len(ids)) if weighted else None
    trained = cached(ids, offsets.to(dtypes[1]), weights).detach()
    cached.eval()
    torch.testing.assert_close(cached(ids, offsets.to(dtypes[1]), weights), trained, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", [PoolingMode.SUM, PoolingMode.MEAN])
def test_half_precision_output(mode: PoolingMode) -> None:
    cached, plain = pair(output_dtype=SparseType.FP16, pooling_mode=mode)
    for step in range(3):
        train_both(cached, plain, *batch(step))
    same_rows(cached, plain)
    ids, offsets = batch(9)
    trained = cached(ids, offsets).detach()
    cached.eval()
    output = cached(ids, offsets)
    assert output.dtype == trained.dtype == torch.float16
    torch.testing.assert_close(output, trained, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("mode", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("weighted", [False, True])
def test_variable_batch_sizes(mode: PoolingMode, weighted: bool) -> None:
    cached, plain = pair(pooling_mode=mode)
    of_ranks = [[1, 2], [0, 3], [2, 2], [4, 0]]
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        lengths = torch.randint(0, 4, (sum(map(sum, of_ranks)),), generator=g)
        offsets = torch.cat([torch.tensor([0]), lengths.cumsum(0)])
        parts = lengths.split([sum(sizes) for sizes in of_ranks])
        ids = [torch.randint(TABLES[t][0], (int(n.sum()),), generator=g) for t, n in zip(MAPS, parts, strict=True)]
        weights = torch.rand(int(offsets[-1]), generator=g) if weighted else None
        cached.prefetch(torch.cat(ids), offsets, batch_size_per_feature_per_rank=of_ranks)
        train_both(cached, plain, torch.cat(ids), offsets, weights, batch_size_per_feature_per_rank=of_ranks)
        arguments = (torch.cat(ids), offsets, weights, None, of_ranks)
        trained = cached(*arguments).detach()
        cached.eval()
        torch.testing.assert_close(cached(*arguments), trained, rtol=1e-6, atol=1e-7)
        cached.train()
    same_rows(cached, plain)


@pytest.mark.parametrize("lengths", [[], [0] * 8, [0, 3, 0, 0, 0, 0, 0, 0]])
def test_empty_bags_and_batches(lengths: list[int]) -> None:
    cached, plain = pair()
    ids, offsets = batch(0, lengths)
    train_both(cached, plain, ids, offsets)
    same_rows(cached, plain)
    cached.prefetch(ids, offsets)
    cached.eval()
    with torch.no_grad():
        assert torch.equal(cached(ids, offsets), plain(ids, offsets))


def test_features_without_gradients() -> None:
    cached, plain = pair()
    ids, offsets = batch(0)
    weights = torch.rand(len(ids))
    train_both(cached, plain, ids, offsets, weights, feature_requires_grad=torch.tensor([1, 0, 1, 0]))
    same_rows(cached, plain)


@pytest.mark.parametrize("mode", [BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE, BoundsCheckMode.V2_WARNING])
@pytest.mark.filterwarnings("ignore:.*ids are outside")
def test_an_id_outside_its_table_stands_for_row_0(mode: BoundsCheckMode) -> None:
    cached, plain = pair(bounds_check_mode=mode)
    ids, offsets = batch(0)
    wrong, right = ids.clone(), ids.clone()
    wrong[0], wrong[9], wrong[-1] = -1, 500, 2**40
    right[[0, 9, -1]] = 0
    kept = wrong.clone()
    ours, theirs = cached(wrong, offsets), plain(right, offsets)
    assert torch.equal(ours, theirs) and torch.equal(wrong, kept)
    ours.backward(torch.ones_like(ours))
    theirs.backward(torch.ones_like(ours))
    same_rows(cached, plain)
    cached.eval()
    assert torch.equal(cached(wrong, offsets), cached(right, offsets))


def test_a_warning_counts_the_ids() -> None:
    cached, _ = pair(bounds_check_mode=BoundsCheckMode.WARNING)
    ids, offsets = batch(0)
    ids[:2] = 99999
    for training in (True, False):
        with pytest.warns(UserWarning, match="2 ids are outside tables t0, t1, t2"):
            cached.train(training)(ids, offsets)


@pytest.mark.parametrize("mode", [BoundsCheckMode.FATAL, BoundsCheckMode.NONE, BoundsCheckMode.V2_FATAL])
@pytest.mark.parametrize("number", [-1, 70, 2**31])
def test_a_refused_batch_changes_nothing(mode: BoundsCheckMode, number: int) -> None:
    cached, _ = pair(0.2, CacheAlgorithm.LFU, bounds_check_mode=mode)
    before = batch(1)
    cached(*before).sum().backward()
    ids, offsets = batch(0)
    ids[-1] = number
    untouched = copy.deepcopy(cached._rows)
    batch_number = cached._in_flight.last
    for training, call in ((True, cached), (True, cached.prefetch), (False, cached)):
        cached.train(training)
        with pytest.raises(IndexError, match=f"table t2 has 70 rows here, got the id {number}"):
            call(ids, offsets)
    cached.train()
    assert cached._in_flight.last == batch_number and not cached._in_flight
    for ours, kept in zip(cached._rows.directories, untouched.directories, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))
    for ours, kept in zip(cached.stores(), untouched.stores, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))
    cached(*before).sum().backward()


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 1, 2, 3, 3], "not decrease, they go from 0 to 3"),
        ([1, 1, 2, 3, 4], "they go from 1 to 4"),
        ([0, 3, 2, 3, 4], "go from 0 to 4 and decrease"),
        ([0, 1, 2, 3, 5], "they go from 0 to 5"),
        ([0, 1, 2, 3, 3, 4], "4 bags have 5 offsets, got 6"),
        ([], "offsets, got 0"),
    ],
)
def test_offsets_that_do_not_fit_are_refused(offsets: list[int], message: str) -> None:
    cached, _ = pair()
    for training, call in ((True, cached), (True, cached.prefetch), (False, cached)):
        cached.train(training)
        with pytest.raises(ValueError, match=f"tables t0, t1, t2: .*{message}"):
            call(torch.zeros(4, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64))


def test_weights_that_do_not_fit_are_refused() -> None:
    cached, _ = pair()
    ids, offsets = batch(0)
    with pytest.raises(ValueError, match="ids come with per_sample_weights"):
        cached(ids, offsets, torch.ones(len(ids) - 1))
    assert not cached._in_flight
