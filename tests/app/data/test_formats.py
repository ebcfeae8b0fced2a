"""The options of each format, and a format that is new to the table."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from torchrec_mpe.app.data import formats
from torchrec_mpe.app.data.formats import Format, add_data_options, log_description, prepare_data, prepared_folder
from torchrec_mpe.app.data.log import csv_log
from torchrec_mpe.errors import UserError

from .conftest import WriteLog


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_data_options(parser, prepared=True)
    return parser.parse_args(options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--format", "criteo", "--label", "y", "--numbers", "a"],
            "--label, --numbers cannot be used with --format criteo",
        ),
        (["--format", "csv", "--fields", "a"], "needs --label"),
        (["--format", "csv", "--label", "y"], "needs --fields"),
    ],
)
def test_mistakes_in_the_options(given: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepare_data(parse(*given, "--data", "log"), tmp_path / "out", progress=False)


def test_what_a_job_keeps_of_its_log(tmp_path: Path) -> None:
    options = parse("--format", "csv", "--data", str(tmp_path / "log.csv"), "--label", "y", "--fields", "a, b")
    assert log_description(options) == {
        "log": str(tmp_path / "log.csv"), "format": "csv", "label": "y", "positive": None, "fields": ["a", "b"],
        "numbers": [], "separator": None, "delimiter": None, "columns": None, "time": None,
        "split": "random", "split_seed": 0, "min_count": 2,
    }  # fmt: skip
    assert prepared_folder(options, tmp_path / "out") == tmp_path / "out"
    options = parse("--format", "prepared", "--data", str(tmp_path))
    assert log_description(options) == {} and prepared_folder(options, tmp_path / "out") == tmp_path


def test_a_new_format(write_csv: WriteLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(options: argparse.Namespace) -> formats.Log:
        return replace(csv_log(options.data, label="y", fields=["a"]), delimiter=options.between)

    monkeypatch.setitem(formats.FORMATS, "ssv", Format(read, {"between": {"help": "between cells"}}))
    path = write_csv("y;a", [[f"{k % 2};{k % 3}"] for k in range(90)])
    given = ["--format", "ssv", "--data", str(path), "--between", ";"]
    assert prepare_data(parse(*given), tmp_path / "out", progress=False).fields[0].name == "a"
    assert log_description(parse(*given))["between"] == ";"
    with pytest.raises(UserError, match="--between cannot be used with --format criteo"):
        prepare_data(parse(*given, "--format", "criteo"), tmp_path / "out", progress=False)
