"""The model of an artifact: TorchRec's DLRM. Replace this file by your architecture."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torchrec import EmbeddingBagCollection
from torchrec.models.dlrm import DLRM

import torchrec_mpe as mpe


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
    return loaded
