"""Whether a sharded packed collection says what the unsharded one does."""

import torch
from torch import Tensor
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.inference.probe import draw_probe
from torchrec_mpe.inference.sharded.sharded_collection import ShardedPackedEmbeddingBagCollection

TOLERANCE = 1e-5
"""Largest difference of an element of a bag of several ids of a table in row ranges, as a part of the largest element
of the bags of one id, times the ids of the largest bag: the ranges are summed in another order."""

_SPREAD_IDS = 256


@torch.no_grad()
def verify_sharded(
    sharded: ShardedPackedEmbeddingBagCollection,
    collection: PackedEmbeddingBagCollection,
    probe: KeyedJaggedTensor | None = None,
) -> None:
    """Compare a sharded collection with the unsharded one on one batch.

    Args:
        sharded (ShardedPackedEmbeddingBagCollection): made from ``collection``.
        collection (PackedEmbeddingBagCollection): unsharded.
        probe (Optional[KeyedJaggedTensor]): at least the collection's features, without inverse indices. None: one with
            an empty bag, a bag of several ids, and one each of the first and last row of every table, run and shard and
            of rows between.

    Raises:
        RuntimeError: naming table and feature, if bags of one id, or of a whole table, differ in any bit, or other bags
            by more than :data:`TOLERANCE` allows.
    """
    configs = collection.embedding_bag_configs()
    if probe is None:
        probe = draw_probe(configs, _ids_by_table(sharded, collection), collection.is_weighted(), collection.device)
    probe = probe.to(collection.device)
    want = collection(probe).to_dict()
    got = sharded(probe).to_dict()
    whole = {s.table for s in sharded.shards if sum(s.table == other.table for other in sharded.shards) == 1}
    for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True):
        for name, feature in zip(names, config.feature_names, strict=True):
            lengths = probe[feature].lengths().to(collection.device)
            wanted, found = want[name], got[name].to(want[name].device)
            exact = torch.full_like(lengths, config.name in whole, dtype=torch.bool) | (lengths <= 1)
            different = (found != wanted) & exact.unsqueeze(1)
            several = _beyond_rounding(found[~exact], wanted[~exact], wanted[exact], lengths)
            if bool(different.any()) or several:
                raise RuntimeError(
                    f"table {config.name}, feature {feature}: sharded and unsharded embeddings of the probe batch "
                    f"differ by up to {float((found.double() - wanted.double()).abs().max()):.2e}: do not serve this "
                    "model"
                )


def _beyond_rounding(found: Tensor, wanted: Tensor, of_one_id: Tensor, lengths: Tensor) -> bool:
    if found.numel() == 0:
        return False
    largest = float(torch.cat([of_one_id, wanted]).abs().max())
    unit = TOLERANCE + (torch.finfo(wanted.dtype).eps if wanted.dtype.itemsize == 2 else 0.0)
    allowed = unit * largest * max(1.0, float(lengths.max()))
    return not float((found.double() - wanted.double()).abs().max()) <= allowed  # NaN is a difference


def _ids_by_table(
    sharded: ShardedPackedEmbeddingBagCollection, collection: PackedEmbeddingBagCollection
) -> dict[str, Tensor]:
    """Ends of tables, runs and shards, and rows spread evenly between; work is per run."""
    packed = collection.packed_tables()
    ids: dict[str, Tensor] = {}
    for t, table in enumerate(packed.tables):
        last = table.num_embeddings - 1
        starts = packed.run_starts[int(packed.run_offsets[t]) : int(packed.run_offsets[t + 1])].cpu().long()
        starts = starts[:: -(-max(1, starts.numel()) // _SPREAD_IDS)]
        cuts = torch.tensor([shard.first_row for shard in sharded.shards if shard.table == table.name])
        spread = torch.linspace(0, last, _SPREAD_IDS, dtype=torch.float64).long()
        ids[table.name] = torch.cat([spread, starts, starts - 1, cuts, cuts - 1]).clamp(0, last).unique()
    return ids
