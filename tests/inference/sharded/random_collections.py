"""A packed collection of every directory kind and width, its shards, and what it must return."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.packing.random_codings import coded_collection
from tests.packing.random_tables import KINDS, random_tables
from torchrec_mpe.distributed.planner.packed_placement import PackedShard

DIMS = [4, 8, 13, 16, 4]
FEATURES = [["f0", "f1"], ["f1"], ["f2"], ["f3"], ["f4", "f2"]]
SEEDS = (1, 3, 4)


def collection(
    seed: int, weighted: bool = False, dtype: torch.dtype = torch.float32, mode: int = 0, coded: bool = False
) -> tuple[mpe.PackedEmbeddingBagCollection, list[Tensor]]:
    """Five tables, one of each directory kind, that share features; t1 and t4 pool by MEAN unless weighted.

    With ``coded`` all but t2 are transform-coded, of seeds that are odd with ids that are not in frequency order.

    Returns:
        tuple[PackedEmbeddingBagCollection, list[Tensor]]: and float64 [rows, D] what each table decodes to.
    """
    if coded:
        packed, dense = coded_collection(seed, DIMS, [4, 8, None, 16, 2], remap=seed % 2 == 1)
    else:
        packed, dense = random_tables(seed, DIMS, KINDS)
    configs = [
        EmbeddingBagConfig(
            name=f"t{k}",
            num_embeddings=len(rows),
            embedding_dim=dim,
            feature_names=list(features),
            pooling=PoolingType.MEAN if k in (1, 4) and not weighted else PoolingType.SUM,
        )
        for k, (rows, dim, features) in enumerate(zip(dense, DIMS, FEATURES, strict=True))
    ]
    return mpe.PackedEmbeddingBagCollection(configs, packed, weighted, dtype, bounds_check_mode=mode), dense


def batch(
    dense: list[Tensor], bags: int, dtype: torch.dtype = torch.int64, weighted: bool = False
) -> KeyedJaggedTensor:
    """Bags of 0 to 6 ids, pruned ones of -1 among them, of features in another order, and of one that nobody reads."""
    g = torch.Generator().manual_seed(bags)
    names = ["f3", "unused", "f1", "f4", "f0", "f2"]
    rows = {"f1": min(len(dense[0]), len(dense[1])), "f2": min(len(dense[2]), len(dense[4])), "unused": 5}
    rows |= {"f0": len(dense[0]), "f3": len(dense[3]), "f4": len(dense[4])}
    lengths = torch.randint(0, 7, (len(names), bags), generator=g)
    values = [torch.randint(-1, rows[n], (int(k.sum()),), generator=g) for n, k in zip(names, lengths, strict=True)]
    ids = torch.cat(values).to(dtype)
    weights = torch.rand(len(ids), generator=g) - 0.25 if weighted else None
    return KeyedJaggedTensor.from_lengths_sync(names, ids, lengths.flatten().to(dtype), weights)


def expected(ebc: mpe.PackedEmbeddingBagCollection, dense: list[Tensor], bags: KeyedJaggedTensor) -> Tensor:
    """float64 [B, total_D] by plain indexing."""
    columns: list[Tensor] = []
    for config, rows in zip(ebc.embedding_bag_configs(), dense, strict=True):
        for feature in config.feature_names:
            of_feature = bags[feature]
            ids = of_feature.values().long()
            weights = of_feature.weights().double() if ebc.is_weighted() else torch.ones(len(ids), dtype=torch.float64)
            taken = rows[ids.clamp(min=0)] * (weights * (ids >= 0)).unsqueeze(1)
            sums = [
                each.sum(0) / (max(1, len(each)) if config.pooling == PoolingType.MEAN else 1)
                for each in taken.split(of_feature.lengths().tolist())
            ]
            columns.append(torch.stack(sums) if sums else torch.zeros(0, rows.shape[1], dtype=torch.float64))
    return torch.cat(columns, dim=1)


def shard(table: str, device: int, first_row: int, num_rows: int) -> PackedShard:
    return PackedShard(table, device, first_row, num_rows, 0, 0)


def cut(dense: Sequence[Tensor], devices: int, how: str) -> list[PackedShard]:
    """Whole tables in turn, all tables in ranges, or of both some; ranges start anywhere, on devices in any order."""
    shards: list[PackedShard] = []
    for k, rows in enumerate(dense):
        if how == "tables" or (how == "mixed" and k % 2):
            shards.append(shard(f"t{k}", k % devices, 0, len(rows)))
            continue
        bounds = [0, *(len(rows) * d // devices + d - 1 for d in range(1, devices)), len(rows)]
        for d in range(devices):
            shards.append(shard(f"t{k}", (d + k) % devices, bounds[d], bounds[d + 1] - bounds[d]))
    return shards
