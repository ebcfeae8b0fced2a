"""Artifacts changed by somebody who also fixes what would give the change away."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import torchrec_mpe as mpe
from tests.inference.models import Model, kjt, retrained
from torchrec_mpe.files.document import document_sha256
from torchrec_mpe.inference.artifact.tensor_files import sha256_of_header, sha256_of_tensor

TABLES = "tables-0-0.safetensors"


def emitted(directory: Mapping[str, str] = MappingProxyType({"t1": "bitmap", "t2": "ranked", "t3": "nibble"})) -> Model:
    """A model of every width, by default with a bitmap, runs and nibbles."""
    torch.manual_seed(0)
    model = Model(retrained())
    for _ in range(3):
        model(kjt())
    packed = mpe.emit_inference_model(model, directory=directory)
    assert isinstance(packed, Model)
    return packed


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any], sign: bool = True) -> None:
    """Change the manifest, and by default make its digest fit."""
    file = folder / "manifest.json"
    document = json.loads(file.read_text())
    change(document)
    if sign:
        document["sha256"] = document_sha256(document)
    file.write_text(json.dumps(document))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any], name: str = TABLES) -> None:
    """Change the packed tensors of a file, and make the digests of those that are left fit."""
    file = folder / name
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    digests = {key: sha256_of_tensor(tensor) for key, tensor in tensors.items()}

    def fit(document: dict[str, Any]) -> None:
        entry = document["files"][name]
        entry["tensors"] = {tensor: digests.get(tensor, digest) for tensor, digest in entry["tensors"].items()}
        entry["header_sha256"] = sha256_of_header(file)

    edit_manifest(folder, fit)
