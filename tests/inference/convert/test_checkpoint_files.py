"""Checkpoints of every format, read by rows."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.inference.convert.checkpoints import FORMATS, model, write
from torchrec_mpe.inference.convert.checkpoint_files import open_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS)
def test_rows_are_float32_whatever_is_stored(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = model(dtype).state_dict()
    files = open_checkpoint(write(state, kind, tmp_path), allow_pickle=kind == "dcp")
    prefix = {"torch_nested": "state_dict.", "dcp": "model."}.get(kind, "")
    assert dict(files.shapes) == {prefix + key: tuple(tensor.shape) for key, tensor in state.items()}
    for key in ("sparse.embedding_bags.t_user.weight", "sparse.embedding_bags.t_tag.weight"):
        rows = files.rows(prefix + key, 3, 17)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, state[key][3:17].float())


def test_integers_are_no_tables(tmp_path: Path) -> None:
    save_file({"steps": torch.ones(3, 4, dtype=torch.int64), "w": torch.ones(3, 4)}, tmp_path / "a.safetensors")
    assert list(open_checkpoint(tmp_path / "a.safetensors").shapes) == ["w"]


class _Runs:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("pickle-ran"),))


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2, 2), "x": _Runs()}, "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt cannot be read by torch.load with weights_only=True"):
        open_checkpoint("bad.pt")
    Path("dcp").mkdir()
    Path("dcp/.metadata").write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(ValueError, match=r"\.metadata is a pickle that can run any code: allow pickle if you trust"):
        open_checkpoint("dcp")
    assert not Path("pickle-ran").exists()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is a folder without \.safetensors files and without DCP's \.metadata"):
        open_checkpoint(tmp_path / "empty")
    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(b"garbage")
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            open_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds no floating point tensors"):
        open_checkpoint(tmp_path / "list.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old\.pt cannot be read by torch\.load with weights_only=True and mmap=True"):
        open_checkpoint(tmp_path / "old.pt")
    (tmp_path / "twice").mkdir()
    for name in "ab":
        save_file({"w": torch.ones(2)}, tmp_path / "twice" / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"w is both in .*a\.safetensors and in .*b\.safetensors"):
        open_checkpoint(tmp_path / "twice")
