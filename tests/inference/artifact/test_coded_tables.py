"""Coded tables come back from an artifact as they were, and what damages them is found."""

import copy
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType

import torchrec_mpe as mpe
from tests.inference.liars import edit_tensors
from tests.inference.sharded.random_collections import batch, collection, expected
from torchrec_mpe.app.cli.main import main
from torchrec_mpe.ops.backends import use_backend


@pytest.mark.supports("save and load of transform-coded tables", "CPU")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip(tmp_path: Path, mmap: bool, seed: int) -> None:
    ebc, dense = collection(seed, coded=True)
    mpe.save(ebc, tmp_path / "artifact")
    loaded = mpe.load(tmp_path / "artifact", mmap=mmap, verify=True)
    assert isinstance(loaded, mpe.PackedEmbeddingBagCollection)
    for name, tensor in ebc.packed_tables().tensors().items():
        assert torch.equal(loaded.packed_tables().tensors()[name], tensor), name
    with use_backend("reference"):
        found = loaded(batch(dense, 7)).values()
    torch.testing.assert_close(found.double(), expected(ebc, dense, batch(dense, 7)), rtol=1e-5, atol=1e-4)


def test_buffers_stay_as_they_are() -> None:
    """Levels and bases have two bytes, and travel as integers of as many."""
    ebc, _ = collection(1, coded=True)
    before = {name: buffer.clone() for name, buffer in ebc.named_buffers()}
    assert {torch.bfloat16, torch.float16} <= {buffer.dtype for buffer in before.values()}
    moved = [copy.deepcopy(ebc).half(), copy.deepcopy(ebc).double(), copy.deepcopy(ebc).to("cpu", torch.bfloat16)]
    other, _ = collection(1, coded=True)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(ebc.state_dict())
    for each in (*moved, other):
        for name, buffer in each.named_buffers():
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name
    assert all(buffer.device.type == "meta" for buffer in copy.deepcopy(ebc).to("meta").buffers())
    assert "K=16, " in repr(ebc) and " transformed of " in repr(ebc)


def test_on_fbgemm(tmp_path: Path) -> None:
    """Decoded to INT8, and to INT4 where that is asked for."""
    ebc, dense = collection(0, coded=True)
    mpe.save(ebc, tmp_path / "artifact")
    want = expected(ebc, dense, batch(dense, 7))
    errors = [
        float((on_fbgemm(batch(dense, 7)).values() - want).abs().max())
        for on_fbgemm in (mpe.load(tmp_path / "artifact", backend="fbgemm"), ebc.on_fbgemm(SparseType.INT4))
    ]
    assert 0 < errors[0] < 0.1 < errors[1] < 2


def test_inspect_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ebc, _ = collection(1, coded=True)
    mpe.save(ebc, tmp_path / "artifact")
    assert main(["verify", str(tmp_path / "artifact")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "artifact")]) == 0
    out = capsys.readouterr().out
    report = ebc.size_report()
    assert str(report) in out and "transform" in out
    for table in report.tables:
        assert f"  {table.name}: {table.directory_kind}, {table.describe_rows()}\n" in out
    of_t3 = report.tables[3]
    layout = ebc.packed_tables().layouts()[3]
    runs = [run for run in layout.runs if run.is_transformed]
    assert of_t3.transformed_rows == sum(run.rows for run in runs) > 0
    bits = sum(run.rows * run.row_bits for run in runs) / of_t3.transformed_rows
    assert f"K=16, {''.join(f'{n:,} of {b} bits, ' for b, n in enumerate(layout.rows_per_width) if n)}" in out
    assert f"{of_t3.transformed_rows:,} transformed of {bits:.1f} bits" in out


@pytest.mark.parametrize("name", ["levels", "bases", "components", "levels_offsets", "bases_offsets"])
def test_damage_is_found(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ebc, _ = collection(0, coded=True)
    mpe.save(ebc, tmp_path / "artifact")
    file = tmp_path / "artifact" / "tables-0-0.safetensors"
    data = bytearray(file.read_bytes())
    wanted = ebc.packed_tables().tensors()[name].view(-1).view(torch.uint8).numpy().tobytes()
    data[data.index(wanted)] ^= 1
    file.write_bytes(data)
    assert main(["inspect", str(tmp_path / "artifact")]) == 2
    assert f"is damaged: tensor '{name}' has another digest" in capsys.readouterr().err


def test_a_liar_is_found(tmp_path: Path) -> None:
    """Digests that fit do not hide a basis outside its buffer."""
    ebc, _ = collection(0, coded=True)
    mpe.save(ebc, tmp_path / "artifact")
    edit_tensors(tmp_path / "artifact", lambda t: t["bases_offsets"].__setitem__(4, 10**6))
    with pytest.raises(ValueError, match="table t4: basis offset 1000000 leaves its buffer"):
        mpe.load(tmp_path / "artifact", mmap=True)
