"""The command line end to end on a few hundred rows, and every mistake a user can make."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch

import torchrec_mpe as mpe
from torchrec_mpe.app.cli.main import main
from torchrec_mpe.app.cli.result_table import result_table
from torchrec_mpe.app.data.log import csv_log
from torchrec_mpe.app.data.prepare_log import prepare_log
from torchrec_mpe.app.training.method import Method
from torchrec_mpe.app.training.pipeline import run_pipeline
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.app.training.settings import Settings
from torchrec_mpe.app.training.stages import Job

ROWS = 900


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """user, item and a bag of tags decide the rating."""
    path = tmp_path_factory.mktemp("log") / "log.csv"
    choose = random.Random(0)
    lines = ["user,item,tags,price,rating"]
    for _ in range(ROWS):
        user, item = (
            min(choose.randrange(400), choose.randrange(400)),
            min(choose.randrange(300), choose.randrange(300)),
        )
        tags = "|".join(f"t{choose.randrange(8)}" for _ in range(choose.randrange(4)))
        rating = min(5, max(1, (user * 7 + item * 3) % 5 + 1 + choose.choice([-1, 0, 0, 1])))
        lines.append(f"u{user},i{item},{tags},{choose.randrange(100)},{rating}")
    path.write_text("\n".join(lines) + "\n")
    return path


def csv_options(log: Path) -> list[str]:
    return [
        "--format", "csv", "--data", str(log), "--label", "rating", "--positive", ">=4", "--fields", "user,item,tags",
        "--separator", "|", "--min-count", "1",
    ]  # fmt: skip


SMALL = ["--dim", "8", "--batch-size", "64", "--resets", "1", "--quiet"]


def test_whole_job(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, results = tmp_path / "out", tmp_path / "results.json"
    methods = ["fp32", "uniform:6", "coded:5", "coded:5:nodistill", "cut:4:0.1", "rule:5", "mpe"]
    options = [*csv_options(log), *SMALL, "--out", str(out), "--json", str(results), "--seed", "0", "1"]
    code = main(["run", *options, "--method", *methods])
    printed = capsys.readouterr().out
    assert code == 0
    assert all(method in printed for method in methods) and "± " in printed
    records = json.loads(results.read_text())
    assert json.loads((out / "results.json").read_text()) == records
    assert [(r["seed"], r["method"]) for r in records] == [(s, m) for s in (0, 1) for m in methods]
    for r in records:
        assert set(r) >= {
            "method", "seed", "auc", "logloss", "average_bits", "embedding_bytes", "fp32_bytes", "compression_ratio",
            "seconds",
        }  # fmt: skip
        assert 0 <= r["auc"] <= 1 and r["logloss"] > 0
        assert r["compression_ratio"] == pytest.approx(r["fp32_bytes"] / r["embedding_bytes"], abs=1e-3)
        if r["method"] == "fp32":
            continue
        folder = out / f"{r['method'].replace(':', '-')}-seed{r['seed']}"
        packed = mpe.load(folder / "artifact")
        assert packed.size_report().total == r["embedding_bytes"]
        if r["method"].startswith("coded"):
            assert not (folder / "plan.json").exists()
            assert r["average_bits"] == pytest.approx(32 * packed.size_report().payload / r["fp32_bytes"], abs=1e-5)
            assert r["seconds"] > r["seconds_after_training"]
            continue
        plan = mpe.PrecisionPlan.load(folder / "plan.json")
        assert plan.average_bits == pytest.approx(r["average_bits"], abs=1e-5)
    by_method = {r["method"]: r for r in records if r["seed"] == 0}
    assert by_method["uniform:6"]["average_bits"] == 6
    budget = by_method["rule:5"]["fp32_bytes"] / 5
    assert abs(by_method["rule:5"]["embedding_bytes"] - budget) < max(0.01 * budget, 64 * 3)
    for method in ("coded:5", "coded:5:nodistill"):
        assert 0.99 * budget - 64 < by_method[method]["embedding_bytes"] <= budget
        assert "components-1.png" in {picture.name for picture in out.iterdir()}
    page = (out / "report.html").read_text()
    assert "<h2>Coded tables</h2>" in page and ">coded:5, t_user<" in page
    assert all(method in page for method in methods) and "http://" not in page and "https://" not in page
    assert main(["inspect", str(out / "mpe-seed0" / "artifact")]) == 0
    assert main(["inspect", str(out / "coded-5-seed0" / "artifact")]) == 0
    assert main(["inspect", str(out / "mpe-seed0" / "plan.json")]) == 0
    assert main(["inspect", str(out / "data")]) == 0
    shown = capsys.readouterr().out
    assert "t_user" in shown and "avg bits" in shown and "rows:" in shown


def test_prepared_data_and_dlrm(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = tmp_path / "prepared"
    assert main(["prepare", *csv_options(log), "--numbers", "price", "--out", str(prepared), "--quiet"]) == 0
    assert "user: " in capsys.readouterr().out
    code = main(
        ["run", "--format", "prepared", "--data", str(prepared), "--out", str(tmp_path / "out"), "--model", "dlrm",
         "--method", "rule:8", "cache:int8:0.1", *SMALL]
    )  # fmt: skip
    assert code == 0 and not (tmp_path / "out" / "data").exists()


def test_criteo_format(tmp_path: Path) -> None:
    choose = random.Random(1)
    lines = []
    for _ in range(600):
        numbers = [str(choose.randrange(9)) if choose.random() < 0.8 else "" for _ in range(13)]
        categories = [f"{choose.randrange(6):08x}" if choose.random() < 0.9 else "" for _ in range(26)]
        lines.append("\t".join([str(choose.randrange(2)), *numbers, *categories]))
    path = tmp_path / "train.txt.gz"
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    out = tmp_path / "out"
    arguments = [
        "run",
        "--format",
        "criteo",
        "--data",
        str(path),
        "--out",
        str(out),
        "--method",
        "mpe",
        "--model",
        "dlrm",
    ]
    assert main([*arguments, *SMALL]) == 0
    assert json.loads((out / "results.json").read_text())[0]["method"] == "mpe"


@pytest.mark.parametrize("method", ["mpe", "coded:4"])
def test_same_seed_same_result(method: str, log: Path, tmp_path: Path) -> None:
    records = []
    for name in ("a", "b"):
        out = tmp_path / name
        assert main(["run", *csv_options(log), "--out", str(out), "--method", method, *SMALL]) == 0
        record = json.loads((out / "results.json").read_text())[0]
        del record["seconds"], record["seconds_after_training"]
        records.append(record)
    assert records[0] == records[1]


MISTAKES = {
    "missing file": (["--data", "nowhere.csv"], "nowhere.csv"),
    "missing column": (["--fields", "user,thing"], "thing"),
    "label not binary": (["--positive", "REMOVE"], "rating"),
    "bad positive": (["--positive", "more"], "--positive|positive"),
    "unknown method": (["--method", "magic"], "method 'magic' is unknown"),
    "bad bits": (["--method", "uniform:9"], "bit-width from 1 to 8"),
    "bad fraction": (["--method", "cut:4:2"], "fraction of rows"),
    "bad ratio": (["--method", "rule:0"], "ratio above 1"),
    "bad ratio of coded tables": (["--method", "coded:1"], "ratio above 1"),
    "bad end of a method": (["--method", "coded:9:nodistil"], "method 'coded:9:nodistil' is unknown"),
    "unreachable coding": (["--method", "coded:100000"], "without any bits its tables take"),
    "bad cache": (["--method", "cache:int8"], "use cache:int8:FRACTION"),
    "bad width of a cache": (["--method", "cache:int2:0.1"], "use cache:int8:FRACTION or cache:int4:FRACTION"),
    "bad fraction of a cache": (["--method", "cache:int8:1.5"], "above 0 and at most 1"),
    "bad algorithm of a cache": (["--method", "cache:int8:0.1:fifo"], "with :lru or :lfu"),
    "unreachable ratio": (["--method", "rule:100000"], "does not fit this data"),
    "dim": (["--dim", "6"], "--dim must be a multiple of 4"),
    "resets": (["--resets", "0", "--method", "mpe"], "--resets must be at least 1"),
    "penalty": (["--penalty", "-1"], "--penalty must not be negative"),
    "seed": (["--seed", "-1"], "--seed must not be negative"),
    "another format's options": (["--format", "criteo"], "--label, --positive, --fields, --separator cannot be used"),
    "missing pattern": (["--data", "nowhere/*.csv"], "nowhere/*.csv"),
    "min count": (["--min-count", "0"], "--min-count must be at least 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(mistake: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed, message = MISTAKES[mistake]
    out = tmp_path / "out"
    options = [*csv_options(log), "--out", str(out), "--method", "fp32", *SMALL]
    if "REMOVE" in changed:
        at = options.index("--positive")
        options[at : at + 2] = []
        changed = []
    if "--method" in changed:
        at = options.index("--method")
        options[at : at + 2] = []
    code = main(["run", *options, *changed])
    error = capsys.readouterr().err
    assert code == 2
    lines = [line for line in error.splitlines() if line.startswith("torchrec-mpe: error:")]
    assert len(lines) == 1 and "Traceback" not in error
    assert any(part in lines[0] for part in message.split("|")), lines[0]
    left = [p.name for p in out.iterdir()] if out.exists() else []
    assert left in ([], ["data"]), "only complete outputs may stay"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("user,item,rating\n", "no rows|empty|header"),
        ("user,item,rating\na,b,1\nc,d\n" + "a,b,0\n" * 50, "3"),
        ("user,item,rating\na,b,1\nc,d,x\n" + "a,b,0\n" * 50, "3"),
        ("user,item,rating\n" + ",,1\n,,0\n" * 50, "no ids|empty|nothing"),
    ],
)
def test_bad_logs_are_one_sentence(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.csv").write_text(text)
    code = main(
        ["run", "--format", "csv", "--data", str(tmp_path / "log.csv"), "--label", "rating", "--fields", "user,item",
         "--out", str(tmp_path / "out"), "--quiet"]
    )  # fmt: skip
    error = capsys.readouterr().err.strip()
    assert code == 2 and len(error.splitlines()) == 1
    assert any(part in error for part in message.split("|")), error
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_output_folder_must_be_free(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["run", *csv_options(log), "--out", str(tmp_path), *SMALL]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        for command in (["run", *SMALL], ["prepare", "--quiet"]):
            # Before the log is read, which is not there.
            options = [*csv_options(log), "--out", str(out)]
            options[options.index("--data") + 1] = "nowhere.csv"
            assert main([*command, *options]) == 2
            assert "--out" in capsys.readouterr().err


def test_full_disk(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip  # noqa: E501
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "artifact")

    monkeypatch.setattr("torchrec_mpe.inference.artifact.save_load.write_manifest", full)
    out = tmp_path / "out"
    assert main(["run", *csv_options(log), "--out", str(out), "--method", "rule:5", *SMALL]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["data", "rule-5-seed0"]
    assert not (out / "rule-5-seed0" / "artifact").exists()


def test_inspect_refuses_other_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    for path, message in (
        (tmp_path / "x.json", "is not a precision plan"),
        (tmp_path / "nothing", "does not exist"),
        (tmp_path, "holds no manifest.json"),
    ):
        assert main(["inspect", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_packed_model_predicts_like_the_retrained_one(log: Path, tmp_path: Path) -> None:
    """Emission compares embeddings itself; here with a packing that is off by one code."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        import torchrec_mpe.packing.pack as pack

        original = pack.quantize_and_pack
        patch.setattr(pack, "quantize_and_pack", lambda x, bits, alpha, beta: original(x + alpha, bits, alpha, beta))
        with pytest.raises(RuntimeError, match=r"table .*: packed and retrained embeddings .* differ by"):
            main(["run", *csv_options(log), "--out", str(tmp_path / "out"), "--method", "uniform:6", *SMALL])


@pytest.mark.supports("training: cached tables with torchrec-mpe run", "CPU")
def test_cached_training(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    methods = ["fp32", "cache:int8:1", "cache:int4:0.1:lru", "cache:int4:0.1"]
    assert main(["run", *csv_options(log), *SMALL, "--out", str(out), "--method", *methods]) == 0
    printed = capsys.readouterr().out
    assert "in training" in printed and "without optimizer state" in printed
    fp32, whole, lru, lfu = json.loads((out / "results.json").read_text())
    rows = fp32["fp32_bytes"] // (4 * 8)
    assert fp32["training_bytes"] == fp32["fp32_training_bytes"] == rows * 4 * (8 + 1)
    for record, bits in ((whole, 8), (lru, 4), (lfu, 4)):
        assert record["average_bits"] == bits and record["fp32_training_bytes"] == fp32["training_bytes"]
        assert record["embedding_bytes"] == rows * (8 * bits // 8 + 2), "codes, scale and offset"
        assert record["training_bytes"] == sum(record["training_bytes_by_kind"].values())
        assert set(record["cache_statistics"]) == {"t_user", "t_item", "t_tags"}
        distinct = sum(counters["num_unique_indices"] for counters in record["cache_statistics"].values())
        misses = sum(counters["num_unique_misses"] for counters in record["cache_statistics"].values())
        assert record["hit_rate"] == pytest.approx(1 - misses / distinct, abs=1e-6)
    # Two phases of 11 batches of 64; the reset between them empties the caches.
    assert all(counters["num_calls"] == 22 for counters in whole["cache_statistics"].values())
    assert all(counters["num_evictions"] == 0 for counters in whole["cache_statistics"].values())
    assert lru["hit_rate"] < whole["hit_rate"] and lru["cache_statistics"]["t_user"]["num_evictions"] > 0
    page = (out / "report.html").read_text()
    assert "<h2>Caches</h2>" in page and "cache:int4:0.1:lru, t_user" in page and (out / "hit-rates.png").exists()


def test_a_cache_of_all_rows_trains_like_fp32(log: Path, tmp_path: Path) -> None:
    """But for the rounding of the initial rows, until training makes small differences large."""
    columns = csv_log(log, label="rating", positive=">=4", fields=["user", "item", "tags"], separators="|")
    data = prepare_log(columns, tmp_path / "data", min_count=1, progress=False)
    losses = {}
    with process_group(torch.device("cpu")):
        for name in ("fp32", "cache:int8:1"):
            job = Job(Method.parse(name), data, Settings(dim=8, batch_size=64, resets=0))
            losses[name] = run_pipeline(job).curves["train 1"].loss
    # The first is of the initial rows. The second follows an update: without it, it would be 0.07 away.
    assert losses["cache:int8:1"][:2] == pytest.approx(losses["fp32"][:2], abs=2e-3)


def test_printed_table_by_hand() -> None:
    common = {"logloss": 0.5, "average_bits": 2.0, "embedding_bytes": 2000, "compression_ratio": 16.0, "seconds": 3.0}
    records = [
        {"method": "fp32", "seed": 0, "auc": 0.70, **common},
        {"method": "fp32", "seed": 1, "auc": 0.72, **common},
        {"method": "mpe", "seed": 0, "auc": 0.70, **common},
        {"method": "mpe", "seed": 1, "auc": 0.71, **common},
    ]
    lines = [line.split() for line in result_table(records).splitlines()]
    # Means 0.71 and 0.705; standard errors: deviations 0.0141 and 0.0071 over the root of 2.
    assert lines[1][:4] == ["fp32", "0.7100", "±", "0.0100"]
    assert lines[2] == ["mpe", "0.7050", "±", "0.0050", "-0.0050", "0.5000", "2.000", "2,000", "16.0x", "3"]
    assert len(lines) == 3

    records[0] |= {"training_bytes": 8000, "fp32_training_bytes": 8000}
    cached = {"training_bytes": 2000, "fp32_training_bytes": 8000, "hit_rate": 0.75}
    records.append({"method": "cache:int8:0.05", "seed": 0, "auc": 0.71, **common, **cached})
    lines = [line.split() for line in result_table(records).splitlines()]
    assert lines[0][-5:] == ["training", "bytes", "ratio", "hit", "rate"]
    assert lines[1][-3:] == ["3", "8,000", "1.0x"] and lines[2][-2:] == ["16.0x", "3"]
    assert lines[3][-4:] == ["3", "2,000", "4.0x", "75.0%"]


def test_defaults_on_a_small_log(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that modules cannot have, labels that are texts, fewer rows than a batch, and a second try."""
    rows = [line.split(",") for line in log.read_text().splitlines()[1:300]]
    small = tmp_path / "small.csv"
    liked = ["like" if int(row[4]) >= 4 else "skip" for row in rows]
    lines = [f"{row[0]};{row[1]};{row[1]};{label}" for row, label in zip(rows, liked, strict=True)]
    small.write_text("\n".join(["user.id;a/b;a.b;liked", *lines]) + "\n")
    out = tmp_path / "out"
    options = [
        "run", "--format", "csv", "--data", str(small), "--label", "liked", "--positive", "like", "--fields",
        "user.id,a/b,a.b", "--delimiter", "semicolon", "--out", str(out), "--dim", "8",
    ]  # fmt: skip
    assert main([*options, "--method", "rule:100000"]) == 2
    assert [p.name for p in out.iterdir()] == ["data"]
    capsys.readouterr()
    assert main([*options, "--min-count", "1"]) == 2
    assert "holds data of another log or other options" in capsys.readouterr().err
    assert main(options) == 0
    printed, error = capsys.readouterr()
    assert "is prepared already and used again" in printed
    assert "training rows are fewer than one batch of 512: batches have 16 rows instead" in printed
    assert "warning: coded:100 is left out: method coded:100 does not fit this data" in error
    # Where progress bars go into a file: of each phase, its begin and its end.
    assert "\r" not in error and error.count("fp32 seed 0: train 1 of 4:") == 2
    records = json.loads((out / "results.json").read_text())
    assert [record["method"] for record in records] == ["fp32", "mpe"]
    assert "left out: coded:100" in (out / "report.html").read_text()
    packed = mpe.load(out / "mpe-seed0" / "artifact")
    names = {table.name: table.feature_names for table in packed.embedding_bag_configs()}
    assert names == {"t_user_id": ["user.id"], "t_a_b": ["a/b"], "t_a_b_2": ["a.b"]}


def test_prepared_data_honours_no_options_of_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["run", "--format", "prepared", "--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    assert main([*given, "--label", "y", "--split-seed", "0", "--min-count", "2"]) == 2
    assert "--label, --split-seed, --min-count cannot be used with --format prepared" in capsys.readouterr().err
    assert main([*given, str(tmp_path)]) == 2
    assert "--format prepared takes one folder" in capsys.readouterr().err


def test_labels_without_an_auc_are_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("y,a\n" + "".join(f"{int(k < 90 and k % 2)},{k % 5}\n" for k in range(100)))
    options = ["--data", str(path), "--label", "y", "--fields", "a", "--split", "chronological", "--quiet"]
    assert main(["run", "--format", "csv", *options, "--out", str(tmp_path / "out")]) == 2
    assert "all 10 test rows are negative, so that there is nothing to tell apart" in capsys.readouterr().err
