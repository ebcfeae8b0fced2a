import errno
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from torchrec_mpe.app.data import synthetic
from torchrec_mpe.app.data.log import criteo_log
from torchrec_mpe.app.data.prepare_log import prepare_log
from torchrec_mpe.app.data.synthetic import SyntheticModel, write_synthetic_log
from torchrec_mpe.errors import UserError


def auc(positive: Any, score: Any) -> float:
    """Chance that a positive row scores higher than a negative one."""
    ranks = np.empty(score.size)
    ranks[np.argsort(score)] = np.arange(1, score.size + 1)
    positives = positive.sum()
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * (positive.size - positives)))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "log.tsv"
    write_synthetic_log(path, rows=300_000, seed=0, progress=False)
    return path


def read(path: Path) -> pl.DataFrame:
    return pl.read_csv(path, separator="\t", has_header=False, infer_schema=False)


def test_has_criteos_columns_and_a_long_tail(log: Path) -> None:
    frame = read(log)
    assert frame.shape == (300_000, 40)
    labels, numbers, categories, rest = frame[:, 0], frame[:, 1:14], frame[:, 14:26], frame[:, 26:]
    assert 0.25 < (labels == "1").mean() < 0.35
    assert numbers.null_count().sum_horizontal().item() == 13 * 300_000
    assert rest.null_count().sum_horizontal().item() == 14 * 300_000
    sizes = [column.n_unique() for column in categories]
    assert 165_000 < sum(sizes) < 185_000
    assert sum(size > 10_000 for size in sizes) >= 4 and min(sizes) < 100
    for column in categories:
        assert column.str.len_chars().unique().to_list() == [8]
    largest = categories[:, 0].value_counts()["count"]
    assert (largest == 1).mean() > 0.4 and largest.max() > 10_000


def test_useful_fields_tell_about_the_label_and_useless_ones_do_not(log: Path) -> None:
    frame = read(log)
    positive = (frame[:, 0] == "1").cast(pl.Float64)
    half = 150_000
    for field in range(12):
        # Rate of each id over the first half, judged on the second.
        ids = frame[:, 14 + field]
        rates = (
            pl.DataFrame({"id": ids[:half], "y": positive[:half]})
            .group_by("id")
            .agg(((pl.col("y").sum() + 3) / (pl.len() + 10)).alias("rate"))
        )
        score = pl.DataFrame({"id": ids[half:]}).join(rates, on="id", how="left", maintain_order="left")["rate"]
        noise = np.random.default_rng(0).random(half) * 1e-9
        found = auc((positive[half:] > 0).to_numpy(), score.fill_null(0.3).to_numpy() + noise)
        assert found > 0.55 if field % 2 == 0 else abs(found - 0.5) < 0.01, (field, found)


@pytest.mark.parametrize("seed", [0, 1])
def test_best_auc(seed: int) -> None:
    model = SyntheticModel(seed)
    random = np.random.default_rng(seed)
    logits = model.logits(model.draw(random, 200_000))
    positive = random.random(logits.size) < 1 / (1 + np.exp(-logits))
    assert 0.80 < auc(positive, logits) < 0.82


def test_frequent_ids_matter_more_than_rare_ones() -> None:
    # Field 0 alone is varied: the deviation of the logit over its 20 most frequent ids, and over 1000 rare ones.
    model = SyntheticModel(0)

    def deviation(ids: Any) -> float:
        rows = np.zeros((ids.size, model.fields), np.int64)
        rows[:, 0] = ids
        return float(model.logits(rows).std())

    rare = deviation(np.arange(50_000, 51_000))
    assert deviation(np.arange(20)) > 1.5 * rare > 0.1


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path, seed in zip(paths, (3, 3, 4), strict=True):
        write_synthetic_log(path, rows=2000, seed=seed, progress=False)
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()


def test_can_be_prepared(tmp_path: Path) -> None:
    write_synthetic_log(tmp_path / "log.tsv", rows=5000, progress=False)
    dataset = prepare_log(criteo_log(tmp_path / "log.tsv"), tmp_path / "data", progress=False)
    assert [field.name for field in dataset.fields] == [f"C{i}" for i in range(1, 13)]
    assert dataset.dense_names == ()


def test_mistakes_and_full_disks_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"rows": 0}, {"seed": -1}):
        with pytest.raises(UserError, match="give at least 1 row"):
            write_synthetic_log(tmp_path / "log.tsv", progress=False, **options)

    def full(ids: Any, field: int) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(synthetic, "_texts", full)
    with pytest.raises(OSError):
        write_synthetic_log(tmp_path / "log.tsv", rows=10, progress=False)
    assert list(tmp_path.iterdir()) == []
