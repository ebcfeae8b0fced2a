"""The sharded collection against plain indexing, and bit for bit against the unsharded one where sums allow."""

import copy
import re

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.inference.sharded.random_collections import SEEDS, batch, collection, cut, expected, shard
from torchrec_mpe.inference.sharded.sharded_collection import ShardedPackedEmbeddingBagCollection

CPU = torch.device("cpu")


def sharded(ebc: mpe.PackedEmbeddingBagCollection, shards: list, devices: int) -> ShardedPackedEmbeddingBagCollection:
    return ShardedPackedEmbeddingBagCollection(ebc, shards, [CPU] * devices, CPU)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    largest = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6 * max(1.0, largest))


@pytest.mark.supports("shard_packed: tables and row ranges over devices", "CPU")
@pytest.mark.parametrize("how", ["tables", "rows", "mixed"])
@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("coded", [False, True])
def test_equality(coded: bool, how: str, devices: int, weighted: bool) -> None:
    for seed, dtype in zip(SEEDS, (torch.int64, torch.int32, torch.int64), strict=True):
        ebc, dense = collection(seed, weighted, coded=coded)
        shards = cut(dense, devices, how)
        split = sharded(ebc, shards, devices)
        for bags in (0, 1, 7):
            kjt = batch(dense, bags, dtype, weighted)
            got, unsharded = split(kjt), ebc(kjt)
            want = expected(ebc, dense, kjt)
            assert got.keys() == unsharded.keys() and got.length_per_key() == unsharded.length_per_key()
            assert got.values().dtype == torch.float32
            close(got.values(), want)
            whole = {s.table for s in shards if len([o for o in shards if o.table == s.table]) == 1}
            columns = iter(got.values().split(got.length_per_key(), dim=1))
            others = iter(unsharded.values().split(got.length_per_key(), dim=1))
            for config in ebc.embedding_bag_configs():
                for _ in config.feature_names:
                    column, other = next(columns), next(others)
                    assert config.name not in whole or torch.equal(column, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    ebc, dense = collection(1, dtype=dtype)
    kjt = batch(dense, 7)
    for how in ("tables", "rows"):
        got = sharded(ebc, cut(dense, 2, how), 2)(kjt).values()
        assert got.dtype == dtype
        want = expected(ebc, dense, kjt)
        # Twice the half unit of one rounding would let a second one pass.
        torch.testing.assert_close(got.double(), want, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)


def with_bad_ids(good: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, KeyedJaggedTensor, int]:
    """Ids beyond and below the tables of f1 and f3, the same with row 0 in their place, and how often they are met."""
    bad, mended = good.values().clone(), good.values().clone()
    starts = dict(zip(good.keys(), good.offset_per_key(), strict=False))
    for place, value in ((starts["f1"], 10**6), (starts["f1"] + 1, -7), (starts["f3"], 2**31 - 1)):
        bad[place], mended[place] = value, 0
    make = KeyedJaggedTensor.from_lengths_sync
    return make(good.keys(), bad, good.lengths()), make(good.keys(), mended, good.lengths()), 2 * 2 + 1


@pytest.mark.parametrize("how", ["tables", "rows", "mixed"])
def test_bad_ids_by_bounds_check_mode(how: str) -> None:
    for mode in (1, 2):
        ebc, dense = collection(1, mode=mode)
        bad, mended, lookups = with_bad_ids(batch(dense, 7))
        split = sharded(ebc, cut(dense, 3, how), 3)
        want = expected(ebc, dense, mended)
        close(split(bad).values(), want)
        assert split.tbe.bad_ids == (lookups if mode == 1 else 0)
    ebc, dense = collection(1)
    split = sharded(ebc, cut(dense, 3, how), 3)
    rows = {f"t{k}": len(each) for k, each in enumerate(dense)}
    with pytest.raises(IndexError) as raised:
        split(with_bad_ids(batch(dense, 7))[0])
    said = re.fullmatch(
        r"table (t\d), feature (f1|f3): id (1000000|-7|2147483647) is not in \[0, (\d+)\)", str(raised.value)
    )
    assert said and int(said[4]) == rows[said[1]]
    ebc, dense = collection(1, mode=3)
    good = batch(dense, 7)
    split = sharded(ebc, cut(dense, 3, how), 3)
    close(split(good).values(), expected(ebc, dense, good))


def test_deduplicated_and_varying_batches() -> None:
    ebc, dense = collection(1)
    split = sharded(ebc, cut(dense, 2, "mixed"), 2)
    names = ["f0", "f1", "f2", "f3", "f4"]
    inverse = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]])
    g = torch.Generator().manual_seed(0)
    strides = [[2], [2], [1], [2], [2]]
    lengths = torch.randint(0, 4, (9,), generator=g)
    values = torch.randint(0, 3, (int(lengths.sum()),), generator=g)
    varying = KeyedJaggedTensor(
        names, values, lengths=lengths, stride_per_key_per_rank=strides, inverse_indices=(names, inverse)
    )
    torch.testing.assert_close(split(varying).values(), ebc(varying).values(), rtol=1e-6, atol=1e-5)
    assert split(varying).values().shape == (3, 53)
    lengths = torch.randint(0, 4, (10,), generator=g)
    values = torch.randint(0, 3, (int(lengths.sum()),), generator=g)
    even = KeyedJaggedTensor(names, values, lengths=lengths, stride=2, inverse_indices=(names, inverse))
    torch.testing.assert_close(split(even).values(), ebc(even).values(), rtol=1e-6, atol=1e-5)


def test_it_stays_where_it_is_and_survives_copies_and_state_dicts() -> None:
    ebc, dense = collection(1)
    split = sharded(ebc, cut(dense, 2, "mixed"), 2)
    kjt = batch(dense, 7)
    before = split(kjt).values()
    assert torch.equal(copy.deepcopy(split)(kjt).values(), before)
    split.load_state_dict(split.state_dict())
    assert {buffer.device.type for buffer in split.to("meta").buffers()} == {"cpu"}
    assert torch.equal(split.half()(kjt).values(), before)
    assert sum(split.device_bytes.values()) == sum(b.numel() * b.element_size() for b in split.state_dict().values())


def test_misuse_is_named() -> None:
    ebc, dense = collection(1, weighted=True)
    whole = cut(dense, 1, "tables")
    split = sharded(ebc, whole, 1)
    with pytest.raises(ValueError, match="carry no weights"):
        split(batch(dense, 2))
    with pytest.raises(KeyError, match="table t0, feature f0: the features have only"):
        split(KeyedJaggedTensor.from_lengths_sync(["f1"], torch.tensor([0]), torch.tensor([1]), torch.ones(1)))
    lying = batch(dense, 2, weighted=True)
    lengths = lying.lengths().clone()
    lengths[0] += 1
    with pytest.raises(ValueError, match="offsets must go from 0"):
        split.tbe(lying.values(), torch.arange(15), lying.weights())
    rows = len(dense[2])
    for shards, message in (
        (whole[1:], "table t0: the shards hold 0 of"),
        ([*whole, shard("t2", 0, 0, 1)], "table t2: a shard has"),
        ([*whole[:2], shard("t2", 0, 1, rows - 1), *whole[3:]], "table t2: a shard has .* row 0 is the first"),
        ([*whole[:2], shard("t2", 1, 0, rows), *whole[3:]], "table t2: it is placed on device 1 of 1"),
        ([*whole, shard("t9", 0, 0, 1)], "a table t9; the model has t0"),
    ):
        with pytest.raises(ValueError, match=message):
            sharded(ebc, shards, 1)
    stock = collection(1)[0].on_fbgemm()
    with pytest.raises(TypeError, match="FBGEMM's INT2"):
        sharded(stock, whole, 1)
