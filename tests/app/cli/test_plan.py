"""`torchrec-mpe plan`."""

import json
import re
import time
from pathlib import Path

import pytest
import torch

from torchrec_mpe import PrecisionPlan
from torchrec_mpe.app.cli.main import main
from torchrec_mpe.packing.bit_widths import TableBitWidths

TABLES = """
tables:
  - {name: t_user, num_embeddings: 400_000_000, embedding_dim: 64, feature_names: [user], pooling_factor: 20}
  - {name: t_item, num_embeddings: 5_000_000, embedding_dim: 64, feature_names: [item, seen], pooling: mean}
  - {name: t_tag, num_embeddings: 70_000, embedding_dim: 32, feature_names: [tag], weighted: true}
"""


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    path = tmp_path / "tables.yaml"
    path.write_text(TABLES)
    return path


def large_model(path: Path, count: int) -> Path:
    """More than 1 TB of rows: three tables of 10^9 rows of 64, and others of all sizes."""
    lines = ["tables:"]
    for k in range(count):
        rows = 1_000_000_000 if k < 3 else 2_000_000_000 // count * 26 // (10 + k % 40)
        lines.append(
            f"  - {{name: t{k}, num_embeddings: {rows}, embedding_dim: 64, feature_names: [f{k}], "
            f"pooling_factor: {1 + k % 20}}}"
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def test_prints_tables_and_devices_and_writes_json(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", "--tables", str(tables), "--topology", "16xH100", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^t_user +400,000,000 +64 .*102\.40 GB +1\.60 GB +800\.00 MB", printed, re.MULTILINE)
    assert "68.00 GB available on each of 16 devices" in printed
    document = json.loads(out.read_text())
    assert document["topology"]["devices"] == 16
    by_name = {table["name"]: table for table in document["tables"]}
    assert by_name["t_user"]["by_kind"]["rows"] == 400_000_000 * 64 * 4
    assert by_name["t_user"]["by_kind"]["optimizer_state"] == 400_000_000 * 4
    assert by_name["t_user"]["by_kind"]["row_map"] == 400_000_000 * 2
    assert sum(document["device_bytes"]) == sum(table["device_bytes"] for table in document["tables"])
    assert max(document["device_bytes"]) <= 68 * 10**9
    for name, table in by_name.items():
        shards = document["sharding_plan"][name]["shards"]
        assert sum(s["sizes"][0] * s["sizes"][1] for s in shards) == table["num_embeddings"] * table["embedding_dim"]
        assert {shard["rank"] for shard in shards} <= set(range(16))


def test_phase_batch_and_pooling_factor_change_what_is_held(tables: Path, tmp_path: Path) -> None:
    def activations(*options: str) -> int:
        out = tmp_path / "plan.json"
        arguments = ["plan", "--tables", str(tables), "--topology", "16xH100", "--json", str(out), *options]
        assert main(arguments) == 0
        found = {t["name"]: t["by_kind"]["activations"] for t in json.loads(out.read_text())["tables"]}
        return int(found["t_item"])

    once = activations()
    assert once == 16 * 512 * 2 * 64 * 4
    assert activations("--batch-size", "1024") == 2 * once
    assert activations("--pooling-factor", "3") == 3 * once
    assert activations("--phase", "retrain") == once
    assert activations("--phase", "plain") == 0


def test_precision_plan_is_placed(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {"t_user": (400_000_000, 64), "t_item": (5_000_000, 64), "t_tag": (70_000, 32)}
    precision = PrecisionPlan(
        {name: TableBitWidths(rows, dim, (0, rows // 10, rows), (4, 1)) for name, (rows, dim) in shapes.items()}, (1, 4)
    )
    precision.save(tmp_path / "precision.json")
    out = tmp_path / "plan.json"
    common = ["plan", "--tables", str(tables), "--topology", "16xH100", "--json", str(out)]
    assert main([*common, "--precision", str(tmp_path / "precision.json")]) == 0
    assert "replicate them on every one of the 16, no communication" in capsys.readouterr().out
    packed = json.loads(out.read_text())["packed"]
    assert packed["total_bytes"] == precision.size_report().total
    assert (packed["num_devices"], packed["replicate"]) == (1, True)


def test_tables_in_low_precision_with_a_cache(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    common = ["plan", "--tables", str(tables), "--topology", "16xH100", "--json", str(out)]
    assert main([*common, "--cache", "int4:0.01"]) == 0
    printed = capsys.readouterr().out
    assert "plain phase, cache int4:0.01, batch of 512 a device, 16xH100" in printed
    # 32 bytes of codes, scale, offset, and a byte of optimizer state for each row; slots of 64 float32 for 1% of them.
    listed = r"^t_user +400,000,000 +64 +\w+/customized_kernel +\S+ +14\.00 GB +1\.02 GB"
    assert re.search(listed, printed, re.MULTILINE)
    assert "host memory for tables: max" in printed
    document = json.loads(out.read_text())
    assert (document["phase"], document["cache"]) == ("plain", "int4:0.01")
    by_name = {table["name"]: table for table in document["tables"]}
    assert by_name["t_user"]["by_kind"]["store"] == 400_000_000 * 35
    assert by_name["t_user"]["by_kind"]["rows"] == 0
    assert {shard["compute_kernel"] for shard in document["sharding_plan"].values()} == {"customized_kernel"}
    assert by_name["t_tag"]["by_kind"]["store"] == 70_000 * 19


def test_a_precision_plan_says_which_rows_of_a_store_have_8_bits(tables: Path, tmp_path: Path) -> None:
    shapes = {"t_user": (400_000_000, 64), "t_item": (5_000_000, 64), "t_tag": (70_000, 32)}
    precision = PrecisionPlan(
        {name: TableBitWidths(rows, dim, (0, rows // 10, rows), (6, 2)) for name, (rows, dim) in shapes.items()}, (2, 6)
    )
    precision.save(tmp_path / "precision.json")
    out = tmp_path / "plan.json"
    common = ["plan", "--tables", str(tables), "--topology", "16xH100", "--json", str(out)]
    assert main([*common, "--cache", "int8:0.05", "--precision", str(tmp_path / "precision.json")]) == 0
    document = json.loads(out.read_text())
    by_name = {table["name"]: table for table in document["tables"]}
    rows = 5_000_000 // 10 * 67 + 9 * 5_000_000 // 10 * 35
    # And 12 bytes for every 64 rows of which some have 8 bits and others not.
    assert rows < by_name["t_item"]["by_kind"]["store"] <= rows + 12 * (5_000_000 // 64 + 16)
    assert document["packed"]["total_bytes"] == precision.size_report().total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache", "int2:0.05"], "--cache: 'int2:0.05' is no cache: use int8:FRACTION or int4:FRACTION"),
        (["--topology", "64xX100"], "--topology: '64xX100' names the device 'X100'"),
        (["--topology", "12xH100"], "--topology: 12 devices cannot stand in hosts of 8 each"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--pooling-factor", "0"], "--pooling-factor must be a positive number, got 0.0"),
        (["--reserve", "1"], "--reserve must lie in [0, 1), got 1.0"),
        (["--devices-per-host", "0"], "--devices-per-host must be at least 1, got 0"),
        (["--device-memory", "80"], "--device-memory: '80' is no size in bytes"),
        (["--host-memory", "x"], "--host-memory: 'x' is no size in bytes"),
        (["--json", "."], "--json . is a folder"),
        (["--tables", "missing.yaml"], "missing.yaml: No such file or directory"),
        (["--precision", "missing.json"], "missing.json: No such file or directory"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    options: list[str], message: str, tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--tables", str(tables), "--topology", "16xH100", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_a_precision_plan_of_other_tables_is_refused(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "precision.json"
    PrecisionPlan({"t_user": TableBitWidths(400_000_000, 32, (0, 400_000_000), (4,))}, (4,)).save(path)
    assert main(["plan", "--tables", str(tables), "--topology", "16xH100", "--precision", str(path)]) == 2
    assert "table t_item is no such table there and 5000000 x 64 in --tables" in capsys.readouterr().err
    path.write_text("{}")
    assert main(["plan", "--tables", str(tables), "--topology", "16xH100", "--precision", str(path)]) == 2
    assert f"{path} is not a precision plan" in capsys.readouterr().err


def test_when_nothing_fits_bytes_and_a_change_that_fits_are_told(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    arguments = ["plan", "--tables", str(tables), "--json", str(out), "--devices-per-host", "1"]
    assert main([*arguments, "--topology", "1xH100"]) == 2
    captured = capsys.readouterr()
    assert "error: no sharding plan fits 1 devices: the tables need 106." in captured.err
    assert re.search(r"^t_user +400,000,000 .*102\.40 GB", captured.err, re.MULTILINE)
    devices = re.search(r"- (\d+) devices of this kind instead of 1", captured.err)
    assert devices is not None and not out.exists()
    assert main([*arguments, "--topology", f"{devices[1]}xH100"]) == 0
    assert main([*arguments, "--topology", f"{int(devices[1]) - 1}xH100"]) == 2


@pytest.mark.parametrize("count", [26, 500])
@pytest.mark.parametrize("devices", [64, 512])
def test_a_terabyte_is_planned_in_seconds(count: int, devices: int, tmp_path: Path) -> None:
    """It takes 1 to 5 s alone on a core of 2026; four times that is allowed."""
    path = large_model(tmp_path / "tables.yaml", count)
    out = tmp_path / "plan.json"
    started = time.process_time()
    assert main(["plan", "--tables", str(path), "--topology", f"{devices}xH100", "--json", str(out)]) == 0
    assert time.process_time() - started < 20
    document = json.loads(out.read_text())
    rows = sum(table["by_kind"]["rows"] for table in document["tables"])
    assert rows > 1e12 and len(document["tables"]) == count
    assert max(document["device_bytes"]) <= 68 * 10**9
    assert torch.cuda.is_initialized() is False
