"""Packed collections of few bits, to stand for what coding makes."""

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

import torchrec_mpe as mpe
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables


def packed(
    tables: list[EmbeddingBagConfig], rows: dict[str, Tensor], bits: int = 1
) -> mpe.PackedEmbeddingBagCollection:
    """Rows, float32 [num_embeddings, D] by table, in so many bits."""
    of = [
        TableToPack(
            t.name,
            TableBitWidths(t.num_embeddings, t.embedding_dim, (0, t.num_embeddings), (bits,)),
            lambda start, stop, values=rows[t.name]: values[start:stop],  # type: ignore[misc]
            torch.tensor([0.0, *(1.6 / 2**b for b in range(1, 9))]),
            torch.full((t.embedding_dim,), 0.2),
        )
        for t in tables
    ]
    return mpe.PackedEmbeddingBagCollection(tables, pack_tables(of))
