"""`torchrec-mpe compress` on a small checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import torchrec_mpe as mpe
from torchrec_mpe.app.cli.main import main
from torchrec_mpe.app.data.log import csv_log
from torchrec_mpe.app.data.prepare_log import prepare_log


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tables, counts, a curvature that sees one direction of each, and a log of both fields."""
    folder = tmp_path_factory.mktemp("compress")
    g = torch.Generator().manual_seed(0)
    lines = ["user,item,label"]
    for _ in range(3000):
        user, item = (torch.rand(2, generator=g) ** 3 * torch.tensor([200, 400])).long().tolist()
        lines.append(f"u{user},i{item},{int(torch.rand((), generator=g) < 0.4)}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    data = prepare_log(
        csv_log(folder / "log.csv", label="label", fields=["user", "item"]),
        folder / "data",
        min_count=1,
        progress=False,
    )
    weights, counts, curvature = {}, {}, {}
    for field in data.fields:
        table = f"t_{field.name}"
        weights[f"ebc.embedding_bags.{table}.weight"] = torch.randn(field.num_embeddings, 8, generator=g)
        counts[table] = data.counts(field.name)
        direction = torch.randn(8, generator=g, dtype=torch.float64)
        curvature[table] = direction.outer(direction)
    save_file(weights, folder / "model.safetensors")
    mpe.FrequencyCounter.from_counts(counts).save(folder / "counts.safetensors")
    mpe.Curvature(curvature).save(folder / "curvature.safetensors")
    return folder


def test_artifact_table_and_json(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "artifact", tmp_path / "table.json"
    arguments = ["compress", str(inputs / "model.safetensors"), "--frequencies", str(inputs / "counts.safetensors")]
    arguments += ["--curvature", str(inputs / "curvature.safetensors"), "--ratio", "12", "--quiet"]
    assert main([*arguments, "--out", str(out), "--json", str(file)]) == 0
    printed, document = capsys.readouterr().out, json.loads(file.read_text())
    assert "no --curvature" not in printed and "components" in printed
    packed = mpe.load(out)
    assert document["bytes"] == packed.size_report().total <= document["fp32_bytes"] / 12
    for table in document["tables"]:
        assert table["components"] >= 1 and table["energy"][0] > 0.8  # one direction, and a little of all others
        assert table["plain_rows"] + table["transformed_rows"] + table["unseen_rows"] <= table["num_embeddings"]


def test_counts_from_a_prepared_log(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same artifact as from the counts in a file; without a curvature it says so."""
    for name, counted in (
        ("a", ["--data", str(inputs / "data")]),
        ("b", ["--frequencies", str(inputs / "counts.safetensors")]),
    ):
        arguments = ["compress", str(inputs / "model.safetensors"), *counted, "--bytes", "2KB", "--quiet"]
        assert main([*arguments, "--out", str(tmp_path / name)]) == 0
        assert "no --curvature: rows are coded as if the loss saw all directions" in capsys.readouterr().out
    tables = [(tmp_path / name / "tables-0-0.safetensors").read_bytes() for name in ("a", "b")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/model.safetensors", "--frequencies", "{}/counts.safetensors", "--ratio", "0"], "--ratio must be"),
        (["{}/model.safetensors", "--frequencies", "{}/counts.safetensors", "--ratio", "5000"], "without any bits"),
        (
            ["{}/model.safetensors", "--frequencies", "{}/curvature.safetensors", "--ratio", "9"],
            "is not a frequency file",
        ),
        (["{}/model.safetensors", "--data", "{}/nowhere", "--ratio", "9"], "nowhere"),
        (
            [
                "{}/model.safetensors",
                "--frequencies",
                "{}/counts.safetensors",
                "--curvature",
                "{}/log.csv",
                "--ratio",
                "9",
            ],
            "is not a curvature file",
        ),
        (["{}/none.safetensors", "--frequencies", "{}/counts.safetensors", "--ratio", "9"], "none.safetensors"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    arguments: list[str], message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compress", *(a.format(inputs) for a in arguments), "--out", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()
