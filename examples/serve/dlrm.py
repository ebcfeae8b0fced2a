"""The model of an artifact: TorchRec's DLRM. Replace this file by your architecture."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torchrec import EmbeddingBagCollection
from torchrec.models.dlrm import DLRM

import torchrec_mpe as mpe
from torchrec_mpe.inference.artifact.manifest import read_manifest
from torchrec_mpe.inference.artifact.tensor_files import sha256_of_tensor


def load_dlrm(
    artifact: Path, num_dense: int, dense_arch: Sequence[int], over_arch: Sequence[int], *, verify: bool = False
) -> DLRM:
    """A DLRM with packed rows on the artifact's memory-mapped pages, which all processes of a host share.

    The tables come from the artifact, the layers' sizes from the caller. Dense tensors are always checked by their
    digests; with ``verify`` the rows are too, which reads them all. Raises as :func:`torchrec_mpe.load`.
    """
    collection = mpe.load(artifact, mmap=True)
    if not isinstance(collection, mpe.PackedEmbeddingBagCollection):
        raise ValueError(f"{artifact} holds several collections, a DLRM has one")
    meta = torch.device("meta")
    tables = EmbeddingBagCollection(collection.embedding_bag_configs(), collection.is_weighted(), meta)
    model = DLRM(tables, num_dense, list(dense_arch), list(over_arch), meta)
    loaded: DLRM = mpe.load(artifact, model, mmap=True, verify=verify)
    if not verify:
        _check_dense(artifact, loaded)
    return loaded


def _check_dense(artifact: Path, model: DLRM) -> None:
    document = read_manifest(artifact)
    tensors = model.state_dict()
    of_tables = {file for collection in document["collections"] for file in collection["files"]}
    for file in document["files"].keys() - of_tables:
        for name, digest in document["files"][file]["tensors"].items():
            if sha256_of_tensor(tensors[name]) != digest:
                raise ValueError(f"{artifact / file} is damaged: tensor {name!r} has another digest")
