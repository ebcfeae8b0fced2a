"""Safetensors files of our own kinds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchrec_mpe.files.document import DocumentFormat
from torchrec_mpe.files.tensors_file import read_tensors

FORMAT = DocumentFormat("torchrec_mpe.test", 3, "a test's file")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3), "b": torch.empty(0, 2)}, tmp_path / "f", metadata=FORMAT.text_header())
    found = read_tensors(tmp_path / "f", FORMAT)
    assert found["a"].tolist() == [0, 1, 2] and found["b"].shape == (0, 2)
    with pytest.raises(ValueError, match=r"f is not another$"):
        read_tensors(tmp_path / "f", DocumentFormat("torchrec_mpe.other", 3, "another"))
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "nothing", FORMAT)


@pytest.mark.parametrize("shape", [[2**63, 0], [2**40, 2**40, 0], [0, 10**30]])
def test_damage_is_told_in_one_sentence(shape: list[int], tmp_path: Path) -> None:
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    header = json.dumps({"__metadata__": FORMAT.text_header(), "a": tensor}).encode()
    for data in (b"", header, len(header).to_bytes(8, "little") + header):
        (tmp_path / "f").write_bytes(data)
        with pytest.raises(ValueError, match="f is not a test's file, or damaged: ") as error:
            read_tensors(tmp_path / "f", FORMAT)
        assert "\n" not in str(error.value)
