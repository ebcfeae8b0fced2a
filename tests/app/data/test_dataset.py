import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchrec_mpe.app.data import batching
from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.errors import UserError

from .conftest import WriteLog, prepare_csv

ROWS = 1003


@pytest.fixture
def dataset(write_csv: WriteLog, tmp_path: Path) -> PreparedDataset:
    """1003 rows; the number column tells the row, and the other columns follow from it."""
    rows = [(i % 2, i, f"a{i % 7}", "|".join(f"g{j}" for j in range(i % 4)), f"b{i % 11}") for i in range(ROWS)]
    path = write_csv("y,row,a,g,b", rows)
    return prepare_csv(
        path,
        tmp_path / "data",
        label="y",
        fields=["a", "g", "b"],
        separators={"g": "|"},
        numbers=["row"],
        split="chronological",
        progress=False,
    )


def row_numbers(batch: Any) -> list[int]:
    return torch.expm1(batch.dense_features[:, 0]).round().int().tolist()


def check_batch(dataset: PreparedDataset, batch: Any) -> None:
    """The batch's cells must be those of the rows that its dense feature names."""
    rows = row_numbers(batch)
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [row % 2 for row in rows]
    assert batch.dense_features.dtype == torch.float32
    sparse = batch.sparse_features
    assert sparse.keys() == ["a", "g", "b", "row"]
    assert sparse.stride() == len(rows)
    assert sparse.values().dtype == torch.int64
    value = {name: dataset.vocabulary(name)["value"].to_list() for name in ("a", "g", "b", "row")}
    jagged = sparse.to_dict()
    for name, expected in (
        ("a", [[f"a{row % 7}"] for row in rows]),
        ("b", [[f"b{row % 11}"] for row in rows]),
        ("g", [[f"g{j}" for j in range(row % 4)] for row in rows]),
    ):
        assert [[value[name][i] for i in bag.tolist()] for bag in jagged[name].to_dense()] == expected
    lengths, offsets = sparse.lengths(), sparse.offsets()
    assert offsets.tolist() == [0, *torch.cumsum(lengths, 0).tolist()]


@pytest.mark.parametrize("shuffle_seed", [None, 4])
def test_batches_hold_the_rows_of_the_log(dataset: PreparedDataset, shuffle_seed: int | None) -> None:
    seen = []
    for batch in dataset.batches("train", 64, shuffle_seed=shuffle_seed):
        check_batch(dataset, batch)
        seen += row_numbers(batch)
    assert (seen == list(range(802))) == (shuffle_seed is None)
    assert sorted(seen) == list(range(802))
    for split, first, last in (("validation", 802, 902), ("test", 902, 1003)):
        rows = [row for batch in dataset.batches(split, 64) for row in row_numbers(batch)]
        assert rows == list(range(first, last))
        assert dataset.num_rows(split) == last - first


def test_single_valued_fields_only(write_csv: WriteLog, tmp_path: Path) -> None:
    path = write_csv("y,a,b", [(i % 2, i % 5, i % 3) for i in range(100)])
    dataset = prepare_csv(path, tmp_path / "s", label="y", fields=["a", "b"], split="chronological", progress=False)
    table = {name: dataset.vocabulary(name)["value"].to_list() for name in ("a", "b")}
    sizes = []
    for number, batch in enumerate(dataset.batches("train", 32)):
        size = batch.labels.numel()
        rows = range(32 * number, 32 * number + size)
        sizes.append(size)
        assert batch.dense_features.shape == (size, 0)
        sparse = batch.sparse_features
        assert sparse.lengths().tolist() == [1] * (2 * size)
        assert sparse.offsets().tolist() == list(range(2 * size + 1))
        assert [table["a"][i] for i in sparse["a"].values()] == [str(row % 5) for row in rows]
        assert [table["b"][i] for i in sparse["b"].values()] == [str(row % 3) for row in rows]
    assert sizes == [32, 32, 16]


def test_batches_do_not_share_memory_with_the_files(dataset: PreparedDataset) -> None:
    batch = next(iter(dataset.batches("train", 64)))
    batch.labels.zero_()
    batch.dense_features.zero_()
    batch.sparse_features.values().zero_()
    check_batch(dataset, next(iter(dataset.batches("train", 64))))


@pytest.mark.parametrize("shuffle_seed", [None, 0])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("world_size", "batch_size"), [(1, 64), (2, 64), (3, 50), (4, 100), (3, 89), (3, 100), (5, 1000)]
)
def test_ranks_partition_each_global_batch(
    dataset: PreparedDataset, shuffle_seed: int | None, drop_last: bool, world_size: int, batch_size: int
) -> None:
    options: dict[str, Any] = {"shuffle_seed": shuffle_seed, "drop_last": drop_last}
    (whole,) = dataset.batches("train", 802, shuffle_seed=shuffle_seed)
    order, step = row_numbers(whole), batch_size * world_size
    expected = [order[begin : begin + step] for begin in range(0, 802, step)]
    if drop_last:
        expected = [rows for rows in expected if len(rows) == step]
    elif len(expected[-1]) < world_size:
        expected[-2:] = [expected[-2] + expected[-1]]
    ranks = [
        [
            row_numbers(batch)
            for batch in dataset.batches("train", batch_size, rank=rank, world_size=world_size, **options)
        ]
        for rank in range(world_size)
    ]
    count = dataset.num_batches("train", batch_size, drop_last=drop_last, world_size=world_size)
    assert [len(batches) for batches in ranks] == [count] * world_size
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == expected
    for batches in ranks:
        assert all(len(rows) == batch_size for rows in batches[:-1])
        assert all(0 < len(rows) <= batch_size + 1 for rows in batches)
    sizes = [len(batches[-1]) for batches in ranks if batches]
    assert not sizes or max(sizes) - min(sizes) <= 1
    if drop_last:
        assert all(len(rows) == batch_size for batches in ranks for rows in batches)


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("start", [0, 1, 5, 7, 99])
def test_a_later_start_yields_the_batches_from_there_on(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch, shuffle_seed: int | None, start: int
) -> None:
    # Pieces smaller than what is passed over: a split too large to be permuted at once.
    monkeypatch.setattr("torchrec_mpe.app.data.batching.SHUFFLE_ROWS", 96)
    monkeypatch.setattr("torchrec_mpe.app.data.batching._CHUNK_ROWS", 16)
    options: dict[str, Any] = {"shuffle_seed": shuffle_seed, "rank": 1, "world_size": 2}
    batches = [row_numbers(batch) for batch in dataset.batches("train", 50, **options)]
    assert len(batches) == 9
    assert [row_numbers(batch) for batch in dataset.batches("train", 50, start=start, **options)] == batches[start:]


def test_no_rank_gets_a_batch_without_rows(dataset: PreparedDataset) -> None:
    # 802 = 5 * 160 + 2: two rows are left for five ranks, and join the last full batch.
    ranks = [list(dataset.batches("train", 32, rank=rank, world_size=5, shuffle_seed=1)) for rank in range(5)]
    assert [len(batches) for batches in ranks] == [5] * 5
    assert sorted(batches[-1].labels.numel() for batches in ranks) == [32, 32, 32, 33, 33]
    for batches in ranks:
        check_batch(dataset, batches[-1])
    with pytest.raises(ValueError, match="802 rows, which 803 ranks cannot share"):
        dataset.batches("train", 1, rank=0, world_size=803)


def test_shuffling_is_repeatable(dataset: PreparedDataset) -> None:
    def order(seed: int) -> list[int]:
        return [row for batch in dataset.batches("train", 64, shuffle_seed=seed) for row in row_numbers(batch)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_shuffling_in_pieces_is_a_permutation(monkeypatch: pytest.MonkeyPatch, dataset: PreparedDataset) -> None:
    monkeypatch.setattr(batching, "SHUFFLE_ROWS", 128)
    monkeypatch.setattr(batching, "_CHUNK_ROWS", 16)
    batches = [row_numbers(batch) for batch in dataset.batches("train", 30, shuffle_seed=7)]
    seen = [row for rows in batches for row in rows]
    assert sorted(seen) == list(range(802))
    distance = np.abs(np.diff(seen))
    assert np.median(distance) > 100  # far from file order
    parts = [
        [row_numbers(batch) for batch in dataset.batches("train", 10, shuffle_seed=7, rank=rank, world_size=3)]
        for rank in range(3)
    ]
    assert [list(chain(*rows)) for rows in zip(*parts, strict=True)] == batches


def test_counts(dataset: PreparedDataset) -> None:
    counts = dataset.counts("a")
    assert counts.dtype == torch.int64
    assert counts.shape == (dataset.fields[0].num_embeddings,)
    occurrences = torch.zeros_like(counts)
    for batch in dataset.batches("train", 100):
        occurrences += torch.bincount(batch.sparse_features["a"].values(), minlength=counts.numel())
    assert torch.equal(counts, occurrences)


def test_wrong_arguments(dataset: PreparedDataset) -> None:
    with pytest.raises(ValueError, match="no split 'dev': the splits are train, validation, test"):
        dataset.batches("dev", 1)
    with pytest.raises(ValueError, match="do not fit together"):
        dataset.batches("train", 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="do not fit together"):
        dataset.batches("train", 0)
    with pytest.raises(ValueError, match="negative"):
        dataset.batches("train", 1, shuffle_seed=-1)
    with pytest.raises(KeyError, match="no field 'zz': the fields are a, g, b, row"):
        dataset.counts("zz")


def test_opening_again_gives_the_same(dataset: PreparedDataset) -> None:
    again = PreparedDataset.open(str(dataset.path))
    assert again.fields == dataset.fields
    assert again.dense_names == dataset.dense_names == ("row",)
    assert again.manifest == dataset.manifest


def test_what_is_no_prepared_folder(dataset: PreparedDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        PreparedDataset.open(tmp_path / "gone")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        PreparedDataset.open(tmp_path)
    file = dataset.path / "manifest.json"
    manifest = json.loads(file.read_text())
    for text, message in (
        (json.dumps(manifest | {"format_version": 99}), "format version 99, and this version reads 1"),
        (json.dumps({"format_version": 1}), "is damaged"),
        ("[]", "is damaged"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            PreparedDataset.open(dataset.path)


@pytest.mark.parametrize("name", ["train/labels.npy", "test/ids.npy", "train/1.values.npy", "train/1.offsets.npy"])
def test_damaged_arrays(dataset: PreparedDataset, name: str) -> None:
    file = dataset.path / name
    data, array = file.read_bytes(), np.load(file)
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match="is damaged"):
        PreparedDataset.open(dataset.path)
    np.save(file, array[:-1])
    with pytest.raises(UserError, match=r"the manifest wants|is damaged"):
        PreparedDataset.open(dataset.path)
    np.save(file, array.astype(np.float64))
    with pytest.raises(UserError, match="the manifest wants"):
        PreparedDataset.open(dataset.path)
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        PreparedDataset.open(dataset.path)


def test_damaged_vocabulary(dataset: PreparedDataset) -> None:
    file = dataset.path / "vocabulary" / "0.parquet"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="missing or damaged"):
        dataset.counts("a")


@pytest.mark.parametrize("shuffle_seed", [None, 5])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ids", -1, "an id that is none of its field"),
        ("ids", 10**6, "an id that is none of its field"),
        ("labels", 7, "a label that is neither 0 nor 1"),
        ("labels", np.nan, "a label that is neither 0 nor 1"),
        ("dense", np.inf, "a number that is not finite"),
        ("1.values", -1, "an id that is none of its field"),
        ("1.values", 10**6, "an id that is none of its field"),
        ("1.offsets", -(10**9), "a bag that is none of its values"),
        ("1.offsets", 10**9, "a bag that is none of its values"),
    ],
)
def test_damaged_cells_are_found_before_a_batch_has_them(
    dataset: PreparedDataset, name: str, value: float, said: str, shuffle_seed: int | None
) -> None:
    file = dataset.path / "train" / f"{name}.npy"
    array = np.load(file, mmap_mode="r+")
    array.reshape(-1)[100] = value
    array.flush()
    damaged = PreparedDataset.open(dataset.path)
    with pytest.raises(UserError, match=rf"{name}\.npy is damaged, it holds {said}: prepare the log again"):
        list(damaged.batches("train", 32, shuffle_seed=shuffle_seed))
