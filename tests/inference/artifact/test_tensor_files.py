"""Files that the safetensors package reads, and that can be mapped."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchrec_mpe.inference.artifact.tensor_files import (
    DTYPES,
    map_tensors,
    sha256_of_header,
    sha256_of_tensor,
    write_tensors,
)


def tensors() -> dict[str, Tensor]:
    """Of every dtype, some empty, without dimensions, not contiguous, or of a multiple of 64 bytes."""
    g = torch.Generator().manual_seed(0)
    of_dtype = {name: torch.randint(0, 2, (3, 5), generator=g).to(dtype) for name, dtype in DTYPES.items()}
    return {
        **of_dtype,
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(3),
        "transposed": torch.randn(4, 6, generator=g).t(),
        "small lines": torch.randint(0, 256, (64,), generator=g, dtype=torch.uint8),
        "lines": torch.randint(0, 256, (1 << 16,), generator=g, dtype=torch.uint8),
        "view": torch.arange(100.0)[7:],
    }


def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_mpe.inference.artifact.tensor_files._CHUNK_BYTES", 1000)
    want = tensors()
    entries = write_tensors(tmp_path, "x", want, 1 << 30)
    (file,) = tmp_path.iterdir()
    digests = entries[file.name]["tensors"]
    assert list(entries) == [file.name] and digests.keys() == want.keys()
    data = file.read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    assert entries[file.name]["header_sha256"] == sha256_of_header(file) == hashlib.sha256(header).hexdigest()
    mapped, theirs = map_tensors(file), load_file(file)
    assert mapped.keys() == theirs.keys() == want.keys()
    for name, tensor in want.items():
        for found in (mapped[name], theirs[name]):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found, tensor), name
        assert mapped[name].data_ptr() % tensor.itemsize == 0
        digest = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        assert digests[name] == sha256_of_tensor(tensor) == sha256_of_tensor(mapped[name]) == digest
    for name in ("lines", "small lines"):
        assert mapped[name].data_ptr() % 64 == 0


def test_what_others_wrote_is_mapped(tmp_path: Path) -> None:
    """The package's own writer starts tensors at multiples of 8 bytes."""
    want = {name: tensor.contiguous().clone() for name, tensor in tensors().items()}
    save_file(want, tmp_path / "x.safetensors", {"a": "b"})
    for name, tensor in map_tensors(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, want[name])


def test_mapped_tensors_do_not_write_to_the_file(tmp_path: Path) -> None:
    write_tensors(tmp_path, "x", {"a": torch.ones(5)}, 1 << 30)
    file = tmp_path / "x-0.safetensors"
    mapped = map_tensors(file)["a"]
    mapped.zero_()
    assert map_tensors(file)["a"].tolist() == [1.0] * 5 and mapped.tolist() == [0.0] * 5


def test_same_bytes_in_any_order(tmp_path: Path) -> None:
    for name, order in (("a", list(tensors())), ("b", list(reversed(tensors())))):
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name, "x", {key: tensors()[key] for key in order}, 200)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1] and len(files[0]) > 5


def test_what_is_not_stored(tmp_path: Path) -> None:
    for tensor, message in (
        (torch.zeros(2, dtype=torch.complex64), "tensor a is torch.complex64: an artifact holds dense torch.bool, "),
        (torch.zeros(2).to_sparse(), "tensor a is torch.sparse_coo"),
        (torch.zeros(2, device="meta"), "tensor a is on the meta device"),
    ):
        with pytest.raises(ValueError, match=message):
            write_tensors(tmp_path, "x", {"a": tensor}, 100)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "data",
    [
        b"", b"abc", b"\0" * 8, b"\xff" * 8, (1 << 40).to_bytes(8, "little"), b"\2\0\0\0\0\0\0\0{}x",
        b'\x40\0\0\0\0\0\0\0{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,1]}}     x',
        b'\x40\0\0\0\0\0\0\0{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}    xx',
    ],
)  # fmt: skip
def test_what_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="x is damaged: ") as error:
        map_tensors(tmp_path / "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", ["0,18446744073709551615,18446744073709551615", "4611686018427387904,0,4"])
def test_empty_tensors_of_dimensions_that_no_tensor_has(tmp_path: Path, shape: str) -> None:
    header = f'{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,0]}}}}'.encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(
        ValueError, match=r"x: tensor 'a' has the dimensions .*, which no tensor has|x is damaged: "
    ) as error:
        map_tensors(tmp_path / "x")
    assert "\n" not in str(error.value)


def test_dtypes_that_no_artifact_holds(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.float8_e5m2)}, tmp_path / "x")
    with pytest.raises(ValueError, match="tensor 'a' is of dtype F8_E5M2, which no artifact holds"):
        map_tensors(tmp_path / "x")
