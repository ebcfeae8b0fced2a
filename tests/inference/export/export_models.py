"""A small packed DLRM and its batches, for tests of export."""

import copy

import torch
from torch import Tensor
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.packing.random_codings import coded_table, random_coding
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import pack_tables

KEYS = ["f0", "f1", "f2"]
DENSE = 3


def dlrm(weighted: bool = False, rows: int = 20, bounds_check_mode: int = 0, coded: bool = False) -> torch.nn.Module:
    """Three tables with rows of all widths, or coded ones, one with a remap; one pools by mean unless weighted."""
    dim, g = 8, torch.Generator().manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"t{k}",
            num_embeddings=rows + k,
            embedding_dim=dim,
            feature_names=[key],
            pooling=PoolingType.MEAN if k == 1 and not weighted else PoolingType.SUM,
        )
        for k, key in enumerate(KEYS)
    ]
    widths = {
        t.name: TableBitWidths(
            t.num_embeddings,
            dim,
            (*range(9), t.num_embeddings),
            (0, 1, 2, 3, 4, 5, 6, 7, 8),
            torch.randperm(t.num_embeddings, generator=g).to(torch.int32) if t.name == "t2" else None,
        )
        for t in tables
    }
    torch.manual_seed(0)
    model = DLRM(mpe.MPEEmbeddingBagCollection(tables, is_weighted=weighted), DENSE, [16, dim], [16, 1])
    mpe.prepare_retrain_(model, mpe.PrecisionPlan(widths, tuple(range(9))))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    packed = mpe.emit_inference_model(model)
    collection = packed.sparse_arch.embedding_bag_collection
    packed_tables = collection.packed_tables()
    if coded:
        packed_tables = pack_tables(
            [
                coded_table(t.name, *random_coding(k, t.num_embeddings, dim, (8, 0, 5)[k], remap=t.name == "t2"))
                for k, t in enumerate(tables)
            ]
        )
    packed.sparse_arch.embedding_bag_collection = mpe.PackedEmbeddingBagCollection(
        collection.embedding_bag_configs(), packed_tables, weighted, bounds_check_mode=bounds_check_mode
    )
    return packed


def on_fbgemm(model: torch.nn.Module) -> torch.nn.Module:
    """The same DLRM with its rows in FBGEMM's formats."""
    other = copy.deepcopy(model)
    arch = other.sparse_arch
    arch.embedding_bag_collection = arch.embedding_bag_collection.on_fbgemm()
    return other


def batch(
    size: int, dtype: torch.dtype = torch.int64, weighted: bool = False, most: int = 4, rows: int = 20
) -> tuple[Tensor, ...]:
    """Flat inputs: dense features, ids, offsets and perhaps weights; bags of up to ``most`` ids, some of them -1."""
    g = torch.Generator().manual_seed(size)
    lengths = torch.randint(0, most + 1, (len(KEYS) * size,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(dtype)
    ids = torch.randint(-1, rows, (int(lengths.sum()),), generator=g).to(dtype)
    dense = torch.randn(size, DENSE, generator=g)
    return (dense, ids, offsets, torch.rand(len(ids), generator=g)) if weighted else (dense, ids, offsets)


def arguments(flat: tuple[Tensor, ...]) -> tuple[Tensor, KeyedJaggedTensor]:
    """What the DLRM takes."""
    return flat[0], KeyedJaggedTensor(KEYS, flat[1], flat[3] if len(flat) > 3 else None, offsets=flat[2])


SIZES = ((0, 4), (1, 4), (1, 0), (2, 4), (7, 4), (3, 0))
"""Batch size and largest bag: no examples, one, none or no ids at all."""
