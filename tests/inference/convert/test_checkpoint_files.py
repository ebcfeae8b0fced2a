"""Checkpoints of every format, read by rows."""

import pickle
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.inference.convert.checkpoints import FORMATS, model, write
from torchrec_mpe.inference.convert.checkpoint_files import open_checkpoint
from torchrec_mpe.upstream.sharded_tensor import ShardedTensor


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


class _Pickled:
    """Pickled as an object of a class that needs more than this process to be made."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def __reduce__(self) -> Any:
        return (self._kind, ())


def _nested(depth: int) -> dict[str, Any]:
    state: dict[str, Any] = {"w": torch.ones(2, 2)}
    for _ in range(depth):
        state = {"a": state}
    return state


def _holding_itself() -> dict[str, Any]:
    state: dict[str, Any] = {"w": torch.ones(2, 2)}
    state["more"] = {"again": state}
    return state


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"w": _Pickled(ShardedTensor)}, r"besides tensors it holds torch\.distributed\._shard\.\S*ShardedTensor;"),
        ({"w": torch.ones(2, 2), "args": Namespace(lr=1)}, r"besides tensors it holds argparse\.Namespace;"),
        ({"w": torch.ones(2, 2), "loss": np.float64(1)}, r"besides tensors it holds numpy\.\S*\.scalar, numpy\.dtype;"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Tanh(), nn.GELU()),
            r"holds torch\S*, torch\S*, torch\S* and 2 more",
        ),
        (_holding_itself(), r"the dictionary more\.again holds itself: save the state dict alone"),
        (_nested(100), r"the dictionary (a\.)*a lies in 100 others: save the state dict alone"),
    ],
)
def test_what_is_no_state_dict_is_named_in_one_sentence(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said) as error:
        open_checkpoint(tmp_path / "a.pt")
    assert str(error.value).startswith(f"{tmp_path / 'a.pt'}")
    assert not re.search(r"[\x1b\n]", str(error.value)) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(2, 2).to_sparse(), "a.w is a torch.sparse_coo tensor"),
        (torch.ones(2, 2, device="meta"), "a.w is a tensor on the meta device"),
    ],
)
def test_a_tensor_without_rows_is_named(tensor: torch.Tensor, said: str, tmp_path: Path) -> None:
    torch.save({"a": {"w": tensor, "v": torch.ones(2, 2)}}, tmp_path / "a.pt")
    files = open_checkpoint(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=re.escape(said) + ": save the state dict with whole, dense tensors"):
        files.rows("a.w", 0, 1)
    assert files.rows("a.v", 0, 1).tolist() == [[1, 1]]


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer, .* `git lfs pull`"):
            open_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="is a git-lfs pointer"):
        open_checkpoint(tmp_path)


def test_damaged_pickles_are_told_in_one_sentence(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    at = whole.index(b"\x80\x02}")
    for k in range(2, 40):
        (tmp_path / "a.pt").write_bytes(whole[: at + k] + b"\xff" + whole[at + k + 1 :])
        try:
            open_checkpoint(tmp_path / "a.pt")
        except ValueError as error:
            assert not re.search(r"[\x1b\n]", str(error)) and len(str(error)) < 500
    (tmp_path / "dcp").mkdir()
    for damage in (b"", b"\x80\x04", b"\xff" * 20, pickle.dumps([1]), pickle.dumps({})[:-1]):
        (tmp_path / "dcp" / ".metadata").write_bytes(damage)
        with pytest.raises(ValueError, match=r"dcp/\.metadata cannot be read"):
            open_checkpoint(tmp_path / "dcp", allow_pickle=True)
