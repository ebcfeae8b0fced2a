import errno
import gzip
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from torchrec_mpe.app.data import arrays, coded_log, reader
from torchrec_mpe.app.data.dataset import Field, PreparedDataset
from torchrec_mpe.app.data.log import criteo_log
from torchrec_mpe.app.data.prepare_log import prepare_log
from torchrec_mpe.errors import UserError

from .conftest import WriteLog, prepare_csv


def array(dataset: PreparedDataset, split: str, name: str) -> Any:
    return np.load(dataset.path / split / f"{name}.npy")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# 10 rows: 0..7 train, 8 validates, 9 tests, in file order.
RATINGS = [
    (5, "ann", "x|y"),
    (3, "ann", "x"),
    (5, "bob", ""),
    (4, "ann", "y|x|x"),
    (5, "bob", "z"),
    (1, "cid", "x"),
    (2, "", "x"),
    (5, "", "w|x"),
    (5, "dan", "y|v"),
    (3, "bob", "|x||z|"),
]


def prepare_ratings(write_csv: WriteLog, out: Path, **options: Any) -> PreparedDataset:
    options = {"positive": ">=4", "separators": {"genres": "|"}, "split": "chronological"} | options
    path = write_csv("rating,user,genres", RATINGS)
    return prepare_csv(path, out, label="rating", fields=["user", "genres"], progress=False, **options)


def test_ratings_by_hand(write_csv: WriteLog, tmp_path: Path) -> None:
    dataset = prepare_ratings(write_csv, tmp_path / "out")
    # Training: ann 3, bob 2, "" 2, cid 1 (rare). dan is unseen. The shared id has count 1 and comes last.
    users = dataset.vocabulary("user")
    assert users.row(0) == ("ann", 3)
    assert set(users.rows()[1:3]) == {("bob", 2), ("", 2)}
    assert users.row(3) == (None, 1)
    user = {value: index for index, value in enumerate(users["value"])}
    # Training: x 7 times, y twice, z and w once each and rare; v is unseen. The shared id has 2, after y.
    assert dataset.vocabulary("genres").rows() == [("x", 7), ("y", 2), (None, 2)]
    assert dataset.fields == (Field("user", 4, 3, False), Field("genres", 3, 2, True))

    assert array(dataset, "train", "labels").tolist() == [1, 0, 1, 1, 1, 0, 0, 1]
    assert array(dataset, "validation", "labels").tolist() == [1]
    assert array(dataset, "test", "labels").tolist() == [0]
    names = ["ann", "ann", "bob", "ann", "bob", None, "", ""]
    assert array(dataset, "train", "ids").tolist() == [[user[name]] for name in names]
    assert array(dataset, "validation", "ids").tolist() == [[3]]
    assert array(dataset, "test", "ids").tolist() == [[user["bob"]]]
    assert array(dataset, "train", "1.offsets").tolist() == [0, 2, 3, 3, 6, 7, 8, 9, 11]
    assert array(dataset, "train", "1.values").tolist() == [0, 1, 0, 1, 0, 0, 2, 0, 0, 2, 0]
    assert array(dataset, "validation", "1.offsets").tolist() == [0, 2]
    assert array(dataset, "validation", "1.values").tolist() == [1, 2]
    assert array(dataset, "test", "1.values").tolist() == [0, 2]


def test_min_count_one(write_csv: WriteLog, tmp_path: Path) -> None:
    dataset = prepare_ratings(write_csv, tmp_path / "out", min_count=1)
    users = dataset.vocabulary("user")
    assert users.rows()[3:] == [("cid", 1), (None, 0)]
    assert dataset.fields[0] == Field("user", 5, 4, False)
    assert array(dataset, "validation", "ids").tolist() == [[4]]  # dan
    assert dataset.vocabulary("genres").row(-1) == (None, 0)


def test_one_separator_for_all_fields(write_csv: WriteLog, tmp_path: Path) -> None:
    dataset = prepare_ratings(write_csv, tmp_path / "out", separators="|")
    assert [field.multi_valued for field in dataset.fields] == [True, True]
    assert array(dataset, "train", "0.offsets").tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6]


def test_manifest(write_csv: WriteLog, tmp_path: Path) -> None:
    dataset = prepare_ratings(write_csv, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == dataset.manifest
    assert manifest["format_version"] == 1
    assert manifest["source"]["rows"] == 10
    assert manifest["label"] == {"column": "rating", "positive": ">=4"}
    assert manifest["split"] == {"kind": "chronological", "seed": None, "time": None}
    assert manifest["splits"]["train"] == {"rows": 8, "positives": 5 / 8}
    assert manifest["min_count"] == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "test",
        "train",
        "validation",
        "vocabulary",
    ]


def test_chronological_by_a_time_column(write_csv: WriteLog, tmp_path: Path) -> None:
    times = [9, 0, 8, 1, 7, 2, 6, 3, 5, 4]
    dates = [f"2024-03-0{time + 1 if time < 9 else 9} {'12:00:00' if time < 9 else '13:00:00'}" for time in times]
    for name, column in (("numbers", times), ("dates", dates)):
        path = write_csv(
            "y,a,when", [(time % 2, "pq"[time % 2], when) for time, when in zip(times, column, strict=True)]
        )
        dataset = prepare_csv(
            path,
            tmp_path / name,
            label="y",
            fields=["a"],
            time="when",
            split="chronological",
            progress=False,
        )
        assert array(dataset, "test", "labels").tolist() == [1], name  # time 9
        assert array(dataset, "validation", "labels").tolist() == [0], name  # time 8
        assert array(dataset, "train", "labels").tolist() == [0, 1, 1, 0, 0, 1, 1, 0], name  # in file order


def test_numbers_become_fields_and_dense_features(write_csv: WriteLog, tmp_path: Path) -> None:
    cells = [100, 100, "", 2, 2, " 1.0 ", 1, "", 5000, -7]
    path = write_csv("y,a,n", [(i % 2, "pq"[i % 2], cell) for i, cell in enumerate(cells)])
    dataset = prepare_csv(
        path, tmp_path / "out", label="y", fields=["a"], numbers=["n"], split="chronological", progress=False
    )
    assert [field.name for field in dataset.fields] == ["a", "n"]
    assert dataset.dense_names == ("n",)
    assert set(dataset.vocabulary("n").rows()) == {("21", 2), ("", 2), ("2", 2), ("1", 2), (None, 0)}
    np.testing.assert_allclose(
        array(dataset, "train", "dense")[:, 0], np.log1p([100, 100, 0, 2, 2, 1, 1, 0]), rtol=1e-6
    )
    np.testing.assert_allclose(array(dataset, "validation", "dense"), [[np.log1p(5000)]], rtol=1e-6)
    np.testing.assert_allclose(array(dataset, "test", "dense"), [[0.0]])


def test_criteo(write_criteo: WriteLog, tmp_path: Path) -> None:
    rows = [{"label": i % 2, "I2": 10 * (i % 3), "C1": f"{i % 2:08x}", "C26": "same"} for i in range(20)]
    dataset = prepare_log(criteo_log(write_criteo(rows)), tmp_path / "out", split="chronological", progress=False)
    assert [field.name for field in dataset.fields] == ["I2", "C1"]
    assert dataset.dense_names == ("I2",)
    # ln(10)^2 = 5.3, ln(20)^2 = 8.97; 0 six times, 10 five and 20 five times among 16 rows.
    numbers = dataset.vocabulary("I2").rows()
    assert numbers[0] == ("0", 6) and set(numbers[1:3]) == {("5", 5), ("8", 5)} and numbers[3] == (None, 0)
    assert array(dataset, "train", "dense").shape == (16, 1)
    dropped = {(drop["name"], drop["as"]) for drop in dataset.manifest["dropped"]}
    assert ("C26", "field") in dropped and ("C2", "field") in dropped and ("I1", "dense feature") in dropped
    assert len(dropped) == 12 + 25 + 12
    assert "C26 is left out as a field: it holds one single value in the whole file" in dataset.notes


def test_fields_without_information_are_left_out(write_csv: WriteLog, tmp_path: Path) -> None:
    rows = [(i % 2, "pq"[i % 2], f"unique{i}", "|", "k", "k" if i % 3 else "") for i in range(40)]
    path = write_csv("y,a,all_rare,no_bags,same_bag,some_bag", rows)
    names = ["a", "all_rare", "no_bags", "same_bag", "some_bag"]
    bags = dict.fromkeys(names[2:], "|")
    dataset = prepare_csv(path, tmp_path / "out", label="y", fields=names, separators=bags, progress=False)
    assert [field.name for field in dataset.fields] == ["a", "some_bag"]
    assert dataset.notes == (
        "all_rare is left out as a field: it has no value that is seen 2 times in training rows",
        "no_bags is left out as a field: it is empty in the whole file",
        "same_bag is left out as a field: it holds one single bag in the whole file",
    )
    assert array(dataset, "train", "1.offsets").size == dataset.num_rows("train") + 1


def made_up_rows(count: int) -> list[tuple[object, ...]]:
    random = np.random.default_rng(5)
    ids = (random.pareto(0.7, (count, 2)) * 3).astype(int)
    bags = ["|".join(f"g{j}" for j in random.integers(0, 9, random.integers(0, 4))) for _ in range(count)]
    return [(i % 3 % 2, f"é{a}", b, bag, a % 50) for i, ((a, b), bag) in enumerate(zip(ids, bags, strict=True))]


def prepare_made_up(path: Path, out: Path, **options: Any) -> PreparedDataset:
    return prepare_csv(
        path, out, label="y", fields=["a", "b", "g"], separators={"g": "|"}, numbers=["n"], progress=False, **options
    )


def test_result_depends_on_the_rows_and_options_only(
    write_csv: WriteLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_csv("y,a,b,g,n", made_up_rows(3000))
    expected = contents(prepare_made_up(path, tmp_path / "0").path)
    assert contents(prepare_made_up(path, tmp_path / "1").path) == expected
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(coded_log, "BLOCK_ROWS", 77)
    assert contents(prepare_made_up(path, tmp_path / "2").path) == expected
    other = contents(prepare_made_up(path, tmp_path / "3", seed=1).path)
    assert other["train/ids.npy"] != expected["train/ids.npy"]

    plain = path.read_bytes()
    path.write_bytes(gzip.compress(plain))
    compressed = contents(prepare_made_up(path, tmp_path / "4").path)
    assert {name for name in expected if compressed[name] != expected[name]} == {"manifest.json"}  # the file's size


def test_ids_against_a_plain_count(write_csv: WriteLog, tmp_path: Path) -> None:
    rows = made_up_rows(3000)
    dataset = prepare_made_up(write_csv("y,a,b,g,n", rows), tmp_path / "out", seed=9)
    drawn = np.random.Generator(np.random.Philox(9)).random(3000)
    train = [row for row, u in zip(rows, drawn, strict=True) if u < 0.8]
    test = [row for row, u in zip(rows, drawn, strict=True) if u >= 0.9]
    for column, (name, place) in enumerate((("a", 1), ("b", 2))):
        table = dataset.vocabulary(name)
        counts = dataset.counts(name).tolist()
        field = next(field for field in dataset.fields if field.name == name)
        assert counts == sorted(counts, reverse=True)
        assert sum(counts) == len(train) == dataset.num_rows("train")
        values = table["value"].to_list()
        assert values.index(None) == field.shared_id
        tally: dict[str, int] = {}
        for row in train:
            tally[str(row[place])] = tally.get(str(row[place]), 0) + 1
        kept = {value: count for value, count in tally.items() if count >= 2}
        assert {value: count for value, count in table.rows() if value is not None} == kept
        assert counts[field.shared_id] == sum(count for count in tally.values() if count < 2)
        for split, subset in (("train", train), ("test", test)):
            expected = [values.index(str(row[place])) if str(row[place]) in kept else field.shared_id for row in subset]
            assert array(dataset, split, "ids")[:, column].tolist() == expected
        assert any(str(row[place]) not in tally for row in test)  # so that unseen values are tested


def test_odd_names_do_not_become_file_names(write_csv: WriteLog, tmp_path: Path) -> None:
    path = write_csv("y,../a/ü,b\x00c:*", [(i % 2, "pq"[i % 2], "v|w"[: 1 + 2 * (i % 2)]) for i in range(40)])
    names = ["../a/ü", "b\x00c:*"]
    dataset = prepare_csv(path, tmp_path / "out", label="y", fields=names, separators={names[1]: "|"}, progress=False)
    assert [field.name for field in dataset.fields] == names
    assert dataset.counts(names[0]).sum() == dataset.num_rows("train")


def test_progress_bars(write_csv: WriteLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv("y,a", [(i % 2, i % 4) for i in range(40)])
    prepare_csv(path, tmp_path / "quiet", label="y", fields=["a"], progress=False)
    assert capsys.readouterr() == ("", "")
    prepare_csv(path, tmp_path / "loud", label="y", fields=["a"])
    shown = capsys.readouterr()
    assert shown.out == ""
    assert all(
        stage in shown.err for stage in ("reading log.csv: 100%", "counting: 100%", "ordering: 100%", "writing: 100%")
    )


GOOD = [(i % 2, i % 3, "k") for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([*GOOD, (2, 1, "k")], {}, "line 42, column 'y': '2' is not 0 or 1"),
        ([*GOOD, ("", 1, "k")], {}, "line 42, column 'y': '' is not 0 or 1"),
        ([*GOOD, ("good", 1, "k")], {"positive": ">3"}, "line 42, column 'y': 'good' is not a number"),
        ([*GOOD, ("nan", 1, "k")], {"positive": ">3"}, "line 42, column 'y': 'nan' is not a number"),
        ([*GOOD, (1, 1)], {}, "line 42: 2 columns found where 3 are expected"),
        (GOOD, {"positive": ">3"}, "column 'y' makes every row negative (positive is >3)"),
        (GOOD, {"positive": ">=0"}, "column 'y' makes every row positive (positive is >=0)"),
        (GOOD, {"positive": "good"}, "column 'y' makes every row negative (positive is good)"),
        ([*GOOD, ("", 1, "k")], {"positive": "good"}, "line 42, column 'y': '' is empty, so it is no label"),
        (GOOD, {"positive": ">=good"}, "positive '>=good' is not a comparison with a number"),
        (GOOD, {"columns": ["a", "b"]}, "column 'y' is not among the columns that are named: a, b"),
        (GOOD, {"columns": ["y", "a", "b", "a"]}, "column 'a' is named twice among all columns"),
        (GOOD, {"columns": ["y", "a", "b"]}, "line 1: this is a header line, which is not expected: use no --columns"),
        (GOOD, {"columns": ["y", "a"]}, "line 1: 3 columns found where 2 are expected"),
        (GOOD, {"delimiter": ";"}, "no column 'y': its columns are 'y,a,b': the delimiter seems to be another, give "),
        (GOOD, {"delimiter": ";;"}, "the delimiter ';;' cannot be"),
        ([(i % 2, i, "'[1, 2]'") for i in range(9)], {"fields": ["b"], "delimiter": ";"}, "no column 'y'"),
        ([(i % 2, f"a:0.{i}|b:1.5", "k") for i in range(9)], {}, "column 'a', such as 'a:0.0|b:1.5', holds ids with w"),
        ([(i % 2, f"a:{i}.5", "k") for i in range(9)], {"separators": "|"}, "column 'a', such as 'a:0.5', holds ids w"),
        (GOOD, {"fields": ["z"]}, "no column 'z': its columns are 'y', 'a', 'b'"),
        (GOOD, {"label": "z"}, "no column 'z': its columns are 'y', 'a', 'b'"),
        (GOOD, {"fields": ["b"]}, "no field to learn from: b holds one single value in the whole file"),
        (GOOD, {"fields": []}, "no columns to learn from are named"),
        (GOOD, {"fields": "a"}, "fields is the text 'a': give a list"),
        (GOOD, {"fields": ["a", "y"]}, "column 'y' is the label"),
        (GOOD, {"fields": ["a"], "numbers": ["a"]}, "column 'a' is named more than once"),
        (GOOD, {"separators": {"b": "|"}}, "a separator is given for 'b', which is not among the fields"),
        (GOOD, {"separators": {"a": ""}}, "the separator of field 'a' is empty"),
        ([*GOOD, (1, 1, "x")], {"numbers": ["b"]}, "line 2, column 'b': 'k' is not a number"),
        (GOOD, {"time": "b", "split": "chronological"}, "line 2, column 'b': 'k' is not a time"),
        ([(0, 1, "01/02/2024")] * 20, {"time": "b", "split": "chronological"}, "'01/02/2024' is not a time"),
        (GOOD, {"time": "a"}, "use split 'chronological'"),
        (GOOD, {"time": "y", "split": "chronological"}, "40 rows have too few different times"),
        (GOOD, {"split": "weekly"}, "split 'weekly' is unknown"),
        (GOOD, {"seed": -1}, "seed -1 is negative"),
        (GOOD, {"min_count": 0}, "min_count is 0"),
        (GOOD[:2], {}, "2 rows are too few"),
        ([(i % 2, "", "") for i in range(40)], {"fields": ["a", "b"]}, "holds no ids: columns a, b are empty"),
        ([], {}, "a header line but no rows"),
    ],
)
def test_mistakes_leave_nothing_behind(
    write_csv: WriteLog, tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    path = write_csv("y,a,b", rows)
    options = {"label": "y", "fields": ["a"]} | options
    with pytest.raises(UserError) as caught:
        prepare_csv(path, tmp_path / "out", progress=False, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]


def test_line_of_a_bad_cell_counts_all_blocks_and_empty_lines(
    write_criteo: WriteLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 2000)
    rows: list[dict[str, object]] = [{"label": i % 2, "I1": i, "C1": i % 5} for i in range(1000)]
    rows[900]["I1"] = "many"
    path = write_criteo(rows)
    path.write_text("\n" + path.read_text())
    with pytest.raises(UserError, match="line 902, column 'I1': 'many' is not a number"):
        prepare_log(criteo_log(path), tmp_path / "out", progress=False)


def test_existing_output_is_kept(write_csv: WriteLog, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(UserError, match="already exists and is not an empty folder"):
        prepare_ratings(write_csv, out)
    assert (out / "precious").read_text() == "mine"
    with pytest.raises(UserError, match="already exists"):
        prepare_ratings(write_csv, out / "precious")
    (out / "precious").unlink()
    assert prepare_ratings(write_csv, out).num_rows("train") == 8


@pytest.mark.parametrize("writes", [1, 3, 8, 12, 20])
def test_full_disk_leaves_nothing_behind(
    write_csv: WriteLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    path = write_csv("y,a,b,g,n", made_up_rows(500))
    left = writes
    append = arrays.ArrayWriter.append

    def failing(self: arrays.ArrayWriter, rows: Any) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, rows)

    monkeypatch.setattr(arrays.ArrayWriter, "append", failing)
    with pytest.raises(OSError, match="No space left"):
        prepare_made_up(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]


@pytest.mark.parametrize("limit", [100, 5_000, 20_000])
def test_file_size_limit_leaves_nothing_behind(write_csv: WriteLog, tmp_path: Path, limit: int) -> None:
    path = write_csv("y,a,b,g,n", made_up_rows(3000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError):
            prepare_made_up(path, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]


def test_vocabulary_file_is_plain_parquet(write_csv: WriteLog, tmp_path: Path) -> None:
    dataset = prepare_ratings(write_csv, tmp_path / "out")
    table = pl.read_parquet(tmp_path / "out" / "vocabulary" / "1.parquet")
    assert table.schema == {"value": pl.String, "count": pl.Int64}
    assert table.equals(dataset.vocabulary("genres"))


def test_several_files_are_one_log(write_csv: WriteLog, tmp_path: Path) -> None:
    rows = made_up_rows(600)
    expected = contents(prepare_made_up(write_csv("y,a,b,g,n", rows), tmp_path / "0").path)
    del expected["manifest.json"]  # names the files
    parts = tmp_path / "parts"
    parts.mkdir()
    for place, number in enumerate((1, 9, 10)):
        write_csv("y,a,b,g,n", rows[200 * place : 200 * place + 200], f"parts/day_{number}.csv")
    # The order of columns is each file's own.
    shuffled = [(row[0], row[4], *row[1:4]) for row in rows[200:400]]
    write_csv("y,n,a,b,g", shuffled, "parts/day_9.csv")
    names = [parts / f"day_{number}.csv" for number in (1, 9, 10)]
    for given in (parts, parts / "day_*.csv", names):
        dataset = prepare_made_up(given, tmp_path / "out")  # type: ignore[arg-type]
        got = contents(dataset.path)
        assert dataset.manifest["source"]["bytes"] == sum(name.stat().st_size for name in names)
        assert {name: got[name] for name in expected} == expected
        shutil.rmtree(tmp_path / "out")
        (parts / "_SUCCESS").touch()
    with names[1].open("a") as file:
        file.write("x,1,1,1,\n")
    with pytest.raises(UserError, match=r"day_9\.csv, line 202, column 'y': 'x' is not 0 or 1"):
        prepare_made_up(parts, tmp_path / "out")


def test_parquet_is_read_like_the_same_text(write_csv: WriteLog, tmp_path: Path) -> None:
    rows = made_up_rows(300)
    path = write_csv("y,a,b,g,n,t", [(*row, f"2024-01-01 00:{k // 60:02}:{k % 60:02}") for k, row in enumerate(rows)])
    options: dict[str, Any] = {"time": "t", "split": "chronological"}
    text = contents(prepare_made_up(path, tmp_path / "text", **options).path)
    frame = pl.read_csv(path, try_parse_dates=True)
    frame = frame.with_columns(pl.col("y").cast(pl.Boolean), pl.col("g").str.split("|"))
    frame.write_parquet(tmp_path / "log.parquet", row_group_size=70)
    fields = {"label": "y", "fields": ["a", "b", "g"], "numbers": ["n"], "progress": False}
    dataset = prepare_csv(tmp_path / "log.parquet", tmp_path / "parquet", **fields, **options)
    got = contents(dataset.path)
    assert {name for name in text if got[name] != text[name]} == {"manifest.json"}
    with pytest.raises(UserError, match=r"column 'g' holds lists \(large_list<.*\): only fields can"):
        prepare_csv(tmp_path / "log.parquet", tmp_path / "out", label="y", fields=["a"], numbers=["g"])
    frame.with_columns(pl.lit(2).alias("y")).write_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"bad\.parquet, row 1, column 'y': '2' is not 0 or 1"):
        prepare_csv(tmp_path / "bad.parquet", tmp_path / "out", label="y", fields=["a"], progress=False)
    data = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.parquet is a damaged Parquet file"):
        prepare_csv(tmp_path / "cut.parquet", tmp_path / "out", label="y", fields=["a"], progress=False)


def test_json_lists(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    cells = ['["x", "y"]', "[]", "[3, 4]", "", '["x"]'] * 4
    path.write_text("".join(f"{'no' if k % 2 else 'yes'}\t{cell}\n" for k, cell in enumerate(cells)))
    options: dict[str, Any] = {
        "label": "y", "fields": ["a"], "columns": ["y", "a"], "delimiter": "\t", "positive": "yes", "progress": False,
        "split": "chronological", "min_count": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match="holds lists: with --separator json"):
        prepare_csv(path, tmp_path / "out", **options)
    # In a file without a header, quotes that begin no cell are the cells' own.
    dataset = prepare_csv(path, tmp_path / "out", **options, separators="json")
    assert array(dataset, "train", "labels").tolist() == [1, 0] * 8
    assert array(dataset, "train", "0.offsets").tolist()[:6] == [0, 2, 2, 4, 4, 5]
    assert set(dataset.vocabulary("a")["value"]) == {"x", "y", "3", "4", None}
    path.write_text(path.read_text() + "yes\t['x']\n")
    with pytest.raises(UserError, match=r"line 21, column 'a': .* is no JSON list of texts or whole numbers"):
        prepare_csv(path, tmp_path / "other", **options, separators="json")
