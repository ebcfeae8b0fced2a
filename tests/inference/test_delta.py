"""Deltas of rows as files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torchrec_mpe.inference.delta import load_delta, save_delta

FORMAT = {"format": "torchrec_mpe.delta", "version": "1"}
IDS, VALUES = torch.tensor([4, 9]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    file = tmp_path / "new" / "delta.safetensors"
    rows = {
        "t.1": (IDS.int(), VALUES.requires_grad_()),
        "ids": (torch.empty(0, dtype=torch.int64), torch.empty(0, 2)),
        "t 2": (torch.tensor([0, 1, 2]), torch.arange(6.0).view(2, 3).t()),  # not contiguous
        "t3": (IDS, VALUES),  # shared with t.1
    }
    for _ in range(2):  # it may be there already
        save_delta(file, rows)
    read = load_delta(file)
    assert sorted(read) == sorted(rows)
    for name, (ids, values) in rows.items():
        assert read[name][0].dtype == torch.int64 and read[name][0].tolist() == ids.tolist()
        assert torch.equal(read[name][1], values) and not read[name][1].requires_grad
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_an_empty_delta(tmp_path: Path) -> None:
    save_delta(tmp_path / "delta", {})
    assert load_delta(tmp_path / "delta") == {}


def test_nothing_is_written_for_wrong_rows(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"table t: ids .* got torch.float32 and torch.float32"):
        save_delta(tmp_path / "delta", {"t": (IDS.float(), VALUES)})
    with pytest.raises(ValueError, match=r"table t: ids .* got \[2\] and \[1, 3\]"):
        save_delta(tmp_path / "delta", {"t": (IDS, VALUES[:1])})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"ids.t": IDS, "values.t": VALUES}, None, "is not a delta of rows, as save_delta writes them"),
        ({"ids.t": IDS, "values.t": VALUES}, {**FORMAT, "version": "2"}, "version 2, this release reads version 1"),
        ({"ids.t": IDS}, FORMAT, "damaged: tensor 'ids.t' has no"),
        ({"ids.t": IDS, "values.u": VALUES}, FORMAT, "damaged: tensor"),
        ({"ids.t": IDS, "values.t": VALUES, "t": IDS + 1}, FORMAT, "damaged: tensor 't'"),
        ({"ids.t": IDS, "values.t": VALUES.half()}, FORMAT, "damaged: table t: .* got torch.int64 and torch.float16"),
        ({"ids.t": IDS[:1], "values.t": VALUES}, FORMAT, r"table t: ids .* got \[1\] and \[2, 3\]"),
    ],
)
def test_what_is_no_delta_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None, message: str
) -> None:
    file = tmp_path / "delta"
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=message):
        load_delta(file)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    file = tmp_path / "delta"
    with pytest.raises(FileNotFoundError):
        load_delta(file)
    save_delta(file, {"t": (IDS, VALUES)})
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:7], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file.name} is not a delta of rows, .* or damaged: "):
            load_delta(file)
