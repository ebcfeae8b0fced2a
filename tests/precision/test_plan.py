"""Precision plans: by hand, on disk, and refused."""

import json
import re
from pathlib import Path

import pytest
import torch

from torchrec_mpe import PrecisionPlan
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.precision.row_initialization import RowInitialization


def plan() -> PrecisionPlan:
    ranks = torch.tensor([3, 1, 0, 2], dtype=torch.int32)
    return PrecisionPlan(
        {
            "ranked": TableBitWidths(10, 8, (0, 2, 6, 10), (6, 3, 0)),
            "mapped": TableBitWidths(4, 16, (0, 1, 4), (4, 0), ranks),
        },
        (0, 3, 4, 6),
        "zero",
        RowInitialization(3, 0.5),
        {"method": "by hand"},
    )


def test_rows_and_averages_by_hand() -> None:
    tables = plan().tables
    assert tables["ranked"].of_rows().tolist() == [6, 6, 3, 3, 3, 3, 0, 0, 0, 0]
    assert tables["mapped"].of_rows().tolist() == [0, 0, 4, 0]
    assert tables["ranked"].rows_per_width() == [4, 0, 0, 4, 0, 0, 2, 0, 0]
    assert tables["ranked"].average_bits == 2.4
    # (2.4 bits * 80 elements + 1 bit * 64 elements) / 144
    assert plan().average_bits == pytest.approx((2.4 * 80 + 64) / 144)
    assert TableBitWidths(9, 8, (0, 2, 6, 9), (3, 3, 0)).runs() == [(0, 3), (6, 0)]


def test_save_load(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names[0] == "plan.json" and re.fullmatch(r"plan\.json\.[0-9a-f]{12}\.ranks\.safetensors", names[1])
    text = (tmp_path / "plan.json").read_text()
    assert '"bounds": [0, 2, 6, 10]' in text, "lists belong on one line, for people"
    loaded = PrecisionPlan.load(tmp_path / "plan.json")
    assert {n: t.of_rows().tolist() for n, t in loaded.tables.items()} == {
        n: t.of_rows().tolist() for n, t in plan().tables.items()
    }
    assert (loaded.candidate_bits, loaded.zero_row, loaded.initialization) == (
        (0, 3, 4, 6),
        "zero",
        RowInitialization(3, 0.5),
    )
    assert loaded.provenance["method"] == "by hand" and "torch" in loaded.provenance["versions"]


def test_summary_shows_widths_and_bytes() -> None:
    lines = plan().summary().splitlines()
    assert lines[0].split()[:7] == ["table", "rows", "dim", "0-bit", "3-bit", "4-bit", "6-bit"]
    assert lines[1].split()[:8] == ["ranked", "10", "8", "4", "4", "0", "2", "2.400"]
    assert lines[-1].startswith("all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not a precision plan"),
        ({"version": 2}, "precision plan of version 2"),
        ({"surprise": 1}, "unknown entries"),
        ({"candidate_bits": [0, 3]}, "candidates are"),
        ({"zero_row": "maybe"}, "zero_row"),
        ({"tables": {"t": {"num_embeddings": 3}}}, "not a valid precision plan"),
        ({"initialization": {"seed": 0, "std": -1}}, "must be positive"),
        ({"ranks_sha256": "0" * 64}, "as the file of its places"),
        ({"ranks_file": "../ranks.safetensors"}, "as the file of its places"),
        ({"tables": {}}, "at least one table"),
        ({"tables": []}, "not a valid precision plan"),
    ],
)
def test_load_refuses_what_it_does_not_know(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        PrecisionPlan.load(path)


def test_load_needs_the_ranks(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    ranks = next(tmp_path.glob("*.ranks.safetensors"))
    ranks.write_bytes(ranks.read_bytes()[:-1])
    with pytest.raises(ValueError, match="does not belong to it"):
        PrecisionPlan.load(tmp_path / "plan.json")
    ranks.unlink()
    with pytest.raises(FileNotFoundError, match=r"ranks.safetensors beside it"):
        PrecisionPlan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="is not a precision plan"):
        PrecisionPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "arguments",
    [
        (4, 8, (0, 4), (9,)),
        (4, 8, (0, 3), (1,)),
        (4, 8, (0, 2, 2, 4), (1, 2, 3)),
        (4, 8, (0, 4), (1, 2)),
        (0, 8, (0,), ()),
        (4, 8, (0, 4), (1,), torch.tensor([0, 1, 2, 2], dtype=torch.int32)),
        (4, 8, (0, 4), (1,), torch.tensor([0, 1, 2, 4], dtype=torch.int32)),
        (4, 8, (0, 4), (1,), torch.tensor([0, 1, 2, 3])),
    ],
)
def test_widths_refuse_nonsense(arguments: tuple[object, ...]) -> None:
    with pytest.raises(ValueError):
        TableBitWidths(*arguments)  # type: ignore[arg-type]


def test_a_new_plan_replaces_the_old_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off between its two files, the old plan still loads; completed, nothing of it is left."""
    path = tmp_path / "plan.json"
    plan().save(path)
    other = PrecisionPlan({"t": TableBitWidths(3, 8, (0, 3), (2,), torch.tensor([2, 0, 1], dtype=torch.int32))}, (2,))
    with monkeypatch.context() as patch:
        patch.setattr("torchrec_mpe.precision.plan._readable_json", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.save(path)
    assert PrecisionPlan.load(path).tables == plan().tables
    other.save(path)
    assert PrecisionPlan.load(path).tables == other.tables
    assert len(list(tmp_path.iterdir())) == 2
