"""The stages on one rank: the result of `torchrec-mpe run`, user mistakes, and folders that are finished."""

import json
import os
from pathlib import Path

import pytest

import torchrec_mpe as mpe
from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.data.log import criteo_log
from torchrec_mpe.app.data.prepare_log import prepare_log
from torchrec_mpe.app.data.synthetic import write_synthetic_log
from torchrec_mpe.app.launch.trainer import main
from torchrec_mpe.app.training.method import Method
from torchrec_mpe.app.training.pipeline import run_pipeline
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.app.training.settings import Settings
from torchrec_mpe.app.training.stages import Job

_SETTINGS = ["--dim", "4", "--batch-size", "64", "--seed", "3", "--device", "cpu", "--checkpoint-every", "20"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic_log(folder / "log.tsv", rows=4000, progress=False)
    return prepare_log(criteo_log(folder / "log.tsv"), folder / "prepared", progress=False)


@pytest.fixture(scope="module")
def pipeline(data: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("jobs") / "pipeline"
    assert main(arguments("pipeline", data, out)) == 0
    return out


def arguments(command: str, data: PreparedDataset, out: Path) -> list[str]:
    resets = ["--resets", "2"] if command == "pipeline" else []
    return [command, "--format", "prepared", "--data", str(data.path), "--out", str(out), *_SETTINGS, *resets]


def test_the_stages_come_to_what_run_does_in_one_process(data: PreparedDataset, pipeline: Path) -> None:
    """Bit for bit, though each stage goes through a checkpoint."""
    job = Job(Method.parse("mpe"), data, Settings(seed=3, dim=4, resets=2, batch_size=64))
    with process_group(job.run.device):
        outcome = run_pipeline(job)
    assert outcome.plan is not None
    plan = mpe.PrecisionPlan.load(pipeline / "search" / "plan.json")
    assert {name: table.bits for name, table in plan.tables.items()} == {
        name: table.bits for name, table in outcome.plan.tables.items()
    }
    result = json.loads((pipeline / "artifact" / "manifest.json").read_text())["metadata"]["result"]
    assert result["test"] == {name: outcome.record[name] for name in ("auc", "logloss")}
    assert {k: v for k, v in result.items() if k != "test"} == {k: v for k, v in outcome.record.items() if k in result}
    counts = mpe.FrequencyCounter.load(pipeline / "search" / "counts.safetensors")
    assert counts["t_C1"].tolist() == data.counts("C1").tolist()
    logged = [json.loads(line) for line in (pipeline / "retrain" / "steps.jsonl").read_text().splitlines()]
    assert [line["validation_auc"] for line in logged if "validation_auc" in line] == [
        curve.validation[0]["auc"] for phase, curve in outcome.curves.items() if phase != "search"
    ]


def test_a_finished_job_has_nothing_to_do(
    data: PreparedDataset, pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: os.stat(file).st_mtime_ns for file in pipeline.rglob("*")}
    assert main(arguments("pipeline", data, pipeline)) == 0
    assert capsys.readouterr().out.count("nothing to do") == 3
    assert {file: os.stat(file).st_mtime_ns for file in pipeline.rglob("*")} == before


def test_user_mistakes(
    data: PreparedDataset, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sentence(*command: str) -> str:
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("torchrec-mpe: error: ")
        return line

    search = arguments("search", data, tmp_path / "search")
    assert "--batch-size must be at least 2" in sentence(*search, "--batch-size", "1")
    assert "use a smaller --batch-size or fewer ranks" in sentence(*search, "--batch-size", "4000")
    other = ["search", "--format", "prepared", "--data", str(pipeline), *search[5:]]
    assert "belongs to a job with data" in sentence(*other)
    assert "belongs to a job with batch size 64, and this one has 32" in sentence(
        *arguments("pipeline", data, pipeline), "--batch-size", "32"
    )
    assert "finished search" in sentence("retrain", "--search", str(tmp_path / "search"), "--out", str(tmp_path / "r"))
    assert "holds no job.json" in sentence("retrain", "--search", str(data.path), "--out", str(tmp_path / "r"))
    assert "finished retraining" in sentence(
        "emit", "--retrained", str(pipeline / "search"), "--out", str(tmp_path / "a")
    )
    assert "holds no model packed from" in sentence(
        "emit", "--retrained", str(pipeline / "retrain"), "--out", str(pipeline / "search")
    )
    # Before anything is done.
    (tmp_path / "empty").touch()
    (tmp_path / "foreign" / "artifact").mkdir(parents=True)
    (tmp_path / "foreign" / "artifact" / "manifest.json").write_text("[" * 100_000)
    assert "empty is no folder" in sentence(*arguments("search", data, tmp_path / "empty"))
    assert "holds an artifact or prepared data, no search" in sentence(*arguments("search", data, data.path))
    assert "artifact exists and holds no model packed from" in sentence(
        *arguments("pipeline", data, tmp_path / "foreign")
    )
    assert [file.name for file in (tmp_path / "foreign").iterdir()] == ["artifact"]
    (tmp_path / "bad.tsv").write_text("not\ta log\n")
    bad = ["search", "--format", "criteo", "--data", str(tmp_path / "bad.tsv"), "--out", str(tmp_path / "bad")]
    assert "bad.tsv" in sentence(*bad, *_SETTINGS)
    assert [file.name for file in (tmp_path / "bad").iterdir()] == ["job.json"]
    (tmp_path / "search" / "job.json").write_text("{")
    assert "job.json is not the settings of a job" in sentence(
        "retrain", "--search", str(tmp_path / "search"), "--out", str(tmp_path)
    )
