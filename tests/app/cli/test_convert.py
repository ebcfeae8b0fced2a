"""`torchrec-mpe convert`."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import torchrec_mpe as mpe
from tests.inference.convert.checkpoints import SHAPES, counts, model, write
from torchrec_mpe.app.cli.main import main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write(model().state_dict(), "torch", folder)
    write(model().state_dict(), "dcp", folder)
    mpe.FrequencyCounter.from_counts(counts()).save(folder / "counts.safetensors")
    other = {**counts(), "t_tag": torch.ones(3, dtype=torch.int64)}
    mpe.FrequencyCounter.from_counts(other).save(folder / "other.safetensors")
    lines = [
        f"  - {{name: {n}, num_embeddings: {r}, embedding_dim: {d}, feature_names: [f_{n}]}}"
        for n, (r, d) in SHAPES.items()
    ]
    (folder / "tables.yaml").write_text("tables:\n" + "\n".join(lines) + "\n")
    return folder


def test_artifact_table_and_json(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, facts = tmp_path / "artifact", tmp_path / "facts.json"
    arguments = ["convert", str(inputs / "model.pt"), "--tables", str(inputs / "tables.yaml"), "--ratio", "5"]
    arguments += [
        "--frequencies",
        str(inputs / "counts.safetensors"),
        "--out",
        str(out),
        "--json",
        str(facts),
        "--quiet",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    loaded = mpe.load(out, verify=True)
    assert [c.feature_names for c in loaded.embedding_bag_configs()] == [[f"f_{n}"] for n in SHAPES]
    document = json.loads(facts.read_text())
    report = loaded.size_report()
    assert document["bytes"] == report.total <= report.fp32_bytes / 5
    for table, size in zip(document["tables"], report.tables, strict=True):
        assert (table["name"], table["bytes"], table["rows_per_width"]) == (
            size.name,
            size.total,
            list(size.rows_per_width),
        )
        assert 0 < table["weighted_relative_rms_error"] < table["relative_rms_error"] < 0.6
        shown = f"{table['weighted_relative_rms_error']:.4f} +{table['relative_rms_error']:.4f}"
        assert re.search(
            rf"^{size.name} +{size.num_embeddings} +{size.embedding_dim} .* {shown}", printed, re.MULTILINE
        )
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["metadata"]["errors"]["t_user"]["max_abs_error"] == document["tables"][0]["max_abs_error"]
    assert main(["verify", str(out)]) == 0 and main(["inspect", str(out)]) == 0


def test_bytes_error_bound_and_pickle(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = tmp_path / "facts.json"
    common = ["--quiet", "--json", str(facts)]
    assert main(["convert", str(inputs / "model.pt"), "--bytes", "4kB", "--out", str(tmp_path / "a"), *common]) == 0
    assert json.loads(facts.read_text())["bytes"] <= 4000
    printed = capsys.readouterr().out
    assert "features are called like their tables" in printed and "no --frequencies: all rows count alike" in printed
    dcp = ["convert", str(inputs / "dcp"), "--max-error", "0.05", "--out", str(tmp_path / "b"), *common]
    assert main(dcp) == 2
    assert "give --allow-pickle if you trust" in capsys.readouterr().err
    assert main([*dcp, "--allow-pickle"]) == 0
    assert all(t["weighted_relative_rms_error"] <= 0.05 for t in json.loads(facts.read_text())["tables"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing.pt", "--ratio", "5"], "there is no checkpoint missing.pt"),
        (["{}/model.pt", "--ratio", "-1"], "--ratio must be a positive number, got -1"),
        (["{}/model.pt", "--bytes", "10"], "--bytes: '10' is no size in bytes"),
        (["{}/model.pt", "--bytes", "100B"], "a budget of 100 bytes cannot be met: without any bits the tables take"),
        (["{}/model.pt", "--max-error", "1e-6"], "table t_user: a relative error of 1e-06 cannot be met"),
        (["{}/model.pt", "--ratio", "5", "--frequencies", "{}/none"], "No such file"),
        (["{}/model.pt", "--ratio", "5", "--frequencies", "{}/model.pt"], "is not a frequency file"),
        (
            ["{}/model.pt", "--ratio", "5", "--frequencies", "{}/other.safetensors"],
            "table t_tag has 20 rows, its counts 3",
        ),
        (["{}/model.pt", "--ratio", "5", "--pattern", "x(.*)"], "list the tables with --tables"),
        (["{}/model.pt", "--ratio", "5", "--tables", "{}/wrong.yaml"], "table t_none is not in the checkpoint"),
        (["{}/model.pt", "--ratio", "5", "--out", "{}"], "already exists and is not an empty folder: choose another"),
        (["{}/model.pt", "--ratio", "5", "--json", "."], "--json . is a folder"),
        (["{}/model.pt", "--ratio", "5", "--json", "/dev/null"], "--json /dev/null is no regular file"),
        (["{}/model.pt", "--ratio", "5", "--json", "{}/model.pt/x"], "model.pt is no folder: choose another place"),
        (["{}/model.pt", "--ratio", "5", "--json", "/proc/x/y"], "--json /proc/x/y: /proc cannot be written to"),
        (["{}/model.pt", "--ratio", "5", "--out", "/proc/x"], "--out /proc/x: /proc cannot be written to"),
        (["{}/model.pt", "--ratio", "5", "--out", "{}/new", "--json", "{}/new"], "new is the folder of --out"),
        (["{}/model.pt", "--ratio", "5", "--out", "{}/empty"], "empty already exists and is not an empty folder"),
        (["{}/nan.safetensors", "--ratio", "5"], "table t: rows 0 to 3 hold NaN or infinite values"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    options: list[str], message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (inputs / "wrong.yaml").write_text("tables: [{name: t_none, num_embeddings: 3, embedding_dim: 4}]")
    save_file({"embedding_bags.t.weight": torch.full((4, 4), float("nan"))}, inputs / "nan.safetensors")
    (inputs / "empty").touch()
    out = ["--out", str(tmp_path / "artifact")] if "--out" not in options else []
    assert main(["convert", *(o.replace("{}", str(inputs)) for o in options), *out, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "artifact").exists()


def test_an_outlier_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    rows = torch.randn(400, 8)
    rows[17] = 1e6
    save_file({"embedding_bags.t.weight": rows}, tmp_path / "m.safetensors")
    arguments = ["convert", str(tmp_path / "m.safetensors"), "--ratio", "8", "--out", str(tmp_path / "out"), "--quiet"]
    assert main([*arguments, "--json", str(tmp_path / "facts.json")]) == 0
    assert re.search(r"^table t: row 17 is \d+ times as large as the median row, and most rows have 0 bits", capsys.readouterr().out, re.MULTILINE)  # fmt: skip  # noqa: E501
    assert json.loads((tmp_path / "facts.json").read_text())["tables"][0]["outlier_row"] == 17
