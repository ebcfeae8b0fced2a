"""The tables of collections coded and packed, wherever their rows come from."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from torchrec_mpe.coding.code_tables import TableSummary, code_tables
from torchrec_mpe.coding.owned_rows import OwnedRows, TableToCode
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.inference.packed_table_batched_embedding_bags import PackedTableBatchedEmbeddingBags
from torchrec_mpe.packing.encode import coded_rows
from torchrec_mpe.packing.layout import END_PADDING
from torchrec_mpe.packing.pack import pack_tables
from torchrec_mpe.packing.pack_coded import CodedTableToPack
from torchrec_mpe.packing.table_coding import TableCoding
from torchrec_mpe.precision.counts_of_table import counts_of_table
from torchrec_mpe.precision.frequency_counter import FrequencyCounter
from torchrec_mpe.precision.frequency_order import counts_sha256

_TOLERANCE = 1e-5  # of what a table's rows can reach; float32's rounding stays far below, a wrong code far above
_SECOND_COLLECTION = (
    2 * END_PADDING + 4
)  # bytes of a collection, at most: weights' end, its alignment, run_offsets' end


@dataclass(frozen=True)
class CollectionToCode:
    """The tables of a collection.

    Attributes:
        configs (Sequence[EmbeddingBagConfig]): in its order.
        rows (Mapping[str, OwnedRows]): by table.
        is_weighted (bool): whether features carry per-sample weights.
        device (torch.device): where the packed collection goes, and the group's collectives work.
        group (Optional[ProcessGroup]): of the ranks that own the rows; alone if None.
    """

    configs: Sequence[EmbeddingBagConfig]
    rows: Mapping[str, OwnedRows]
    is_weighted: bool
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class CodedCollections:
    """What was made of some collections.

    Attributes:
        packed (Sequence[PackedEmbeddingBagCollection]): of each, in order; rows without bits read the mean row.
        summaries (Mapping[str, TableSummary]): by table.
        only_unseen (Sequence[TableToCode]): the tables of which no row with lookups has no bits.
    """

    packed: Sequence[PackedEmbeddingBagCollection]
    summaries: Mapping[str, TableSummary]
    only_unseen: Sequence[TableToCode]

    def unseen_means(self) -> dict[str, Tensor]:
        """By table of ``only_unseen`` that has rows without lookups, float32 [D]: their mean.

        It reads the tables once more; in a sharded model every rank calls it.
        """
        return {table.name: mean for table in self.only_unseen if (mean := _mean_of_unseen(table)) is not None}


def code_collections(
    collections: Sequence[CollectionToCode],
    counts: Mapping[str, Tensor],
    curvature: Mapping[str, Tensor] | None,
    *,
    ratio: float | None = None,
    bytes: int | None = None,
    max_components: int | None = None,
    output_dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> CodedCollections:
    """Code the tables of some collections to a number of bytes together; arguments as of :func:`.compress.compress`."""
    tables = [
        _to_code(config, collection.rows[config.name], counts, curvature, weighted=collection.is_weighted)
        for collection in collections
        for config in collection.configs
    ]
    budget = _budget(tables, ratio, bytes)
    group, device = next(((c.group, c.device) for c in collections), (None, torch.device("cpu")))
    _refuse_differences(tables, budget, group, device)
    coded = code_tables(
        tables,
        budget,
        reserved=_SECOND_COLLECTION * (len(collections) - 1),
        max_components=max_components,
        progress=progress,
    )
    codings = _of_first_rank({name: found.coding for name, found in coded.items()}, group, device)
    packed = [_pack(collection, codings, output_dtype) for collection in collections]
    for collection, of_it in zip(collections, packed, strict=True):
        of_it.summaries = {config.name: coded[config.name].summary for config in collection.configs}
    # Where rows with lookups have no bits either, all read their mean.
    only_unseen = [table for table in tables if coded[table.name].summary.zero_rows == 0]
    return CodedCollections(packed, {name: found.summary for name, found in coded.items()}, only_unseen)


def _budget(tables: Sequence[TableToCode], ratio: float | None, bytes: int | None) -> int:
    if (ratio is None) == (bytes is None):
        raise ValueError("give one of ratio and bytes")
    if bytes is not None:
        return bytes
    assert ratio is not None
    if not 1 < ratio < math.inf:
        raise ValueError(f"the ratio must be above 1, got {ratio}")
    return int(sum(4 * t.num_embeddings * t.embedding_dim for t in tables) / ratio)


def _refuse_differences(
    tables: Sequence[TableToCode], budget: int, group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Ranks with other counts would wait for sums of other sizes, or code their rows for themselves."""
    if group is None or dist.get_world_size(group) == 1:
        return
    digest = hashlib.sha256(f"{budget} {counts_sha256({table.name: table.counts for table in tables})}".encode())
    for table in tables:
        for tensor in (table.curvature, *([] if table.weights is None else [table.weights])):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    number = int(digest.hexdigest()[:15], 16)
    ends = torch.tensor([number, -number], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MIN, group=group)
    if int(ends[0]) != -int(ends[1]):
        raise ValueError(
            "the ranks were given different counts, curvatures or budgets: add up the counts of all ranks with "
            "FrequencyCounter.merge_across_ranks()"
        )


def _of_first_rank(
    codings: dict[str, TableCoding], group: dist.ProcessGroup | None, device: torch.device
) -> dict[str, TableCoding]:
    """The first rank's codings on all: those of another processor may differ in a last bit. Orders are not sent."""
    if group is None or dist.get_world_size(group) == 1:
        return codings
    found: list[Any] = [{name: replace(coding, order=None) for name, coding in codings.items()}]
    dist.broadcast_object_list(found, src=dist.get_global_rank(group, 0), group=group, device=device)
    return {name: replace(coding, order=codings[name].order) for name, coding in found[0].items()}


def _to_code(
    config: EmbeddingBagConfig,
    rows: OwnedRows,
    counts: Mapping[str, Tensor],
    curvature: Mapping[str, Tensor] | None,
    *,
    weighted: bool,
) -> TableToCode:
    differ = weighted or config.pooling == PoolingType.MEAN
    weights = counts.squared_weights.get(config.name) if differ and isinstance(counts, FrequencyCounter) else None
    if weights is None and differ:
        raise ValueError(
            f"table {config.name} is looked up with {'weights' if weighted else 'MEAN pooling'}: its counts must be a "
            "FrequencyCounter that has counted such bags, for what a row's error weighs"
        )
    matrix = torch.eye(config.embedding_dim, dtype=torch.float64) if curvature is None else curvature[config.name]
    return TableToCode(
        config.name,
        config.num_embeddings,
        config.embedding_dim,
        counts_of_table(counts, config).cpu(),
        matrix,
        rows,
        weights,
    )


def _pack(
    collection: CollectionToCode, codings: Mapping[str, TableCoding], output_dtype: torch.dtype
) -> PackedEmbeddingBagCollection:
    configs = list(collection.configs)
    tables = [
        CodedTableToPack(t, codings[t], collection.rows[t].pieces, collection.rows[t].sum)
        for t in (c.name for c in configs)
    ]
    encoders = {c.name: codings[c.name].encoder for c in configs}
    packed = PackedEmbeddingBagCollection(
        configs, pack_tables(tables), collection.is_weighted, device=collection.device, encoders=encoders
    )
    for config in configs:
        _check_rows(packed, config.name, codings[config.name], collection.rows[config.name])
    if output_dtype == torch.float32:
        return packed
    return PackedEmbeddingBagCollection(
        configs, packed.packed_tables(), collection.is_weighted, output_dtype, encoders=encoders
    )


def _check_rows(packed: PackedEmbeddingBagCollection, name: str, coding: TableCoding, rows: OwnedRows) -> None:
    """Compare what the lookup reads of the first and last row of each group with what their codes stand for."""
    places = torch.tensor([place for pair in pairwise(coding.bounds) for place in (pair[0], pair[1] - 1)])
    distinct = places.unique()
    if coding.order is not None:
        wanted = torch.zeros(coding.num_embeddings, dtype=torch.bool)
        wanted[distinct] = True
        distinct = wanted[coding.order.cpu()].nonzero().squeeze(1)
    trained = rows.sum(rows.rows(distinct))
    want = torch.cat(
        [coded_rows(row[None], coding, i, table=name) for i, row in zip(distinct.tolist(), trained, strict=True)]
    )
    table = next(t for t, shape in enumerate(packed.packed_tables().tables) if shape.name == name)
    assert isinstance(packed.tbe, PackedTableBatchedEmbeddingBags)
    feature, device = packed.tbe.feature_table_map.index(table), packed.device
    offsets = torch.arange(len(distinct) + 1, device=device)
    weights = torch.ones(len(distinct), device=device) if packed.is_weighted() else None
    read = packed.tbe.lookup(slice(feature, feature + 1), distinct.to(device), offsets, weights).cpu()
    reach = float(want.abs().max()) + float(coding.mean.abs().max())
    wrong = (~((read - want).abs().amax(1) <= _TOLERANCE * reach)).nonzero()  # NaN is wrong
    if wrong.numel():
        row = int(distinct[int(wrong[0])])
        raise RuntimeError(f"table {name}: the lookup reads row {row} as something else than its codes stand for")


def _mean_of_unseen(table: TableToCode) -> Tensor | None:
    """The mean of a table's rows without lookups, float32 [D]; None if it has none."""
    unseen = table.counts == 0
    if not bool(unseen.any()):
        return None
    total = torch.zeros(table.embedding_dim, dtype=torch.float64)
    for first, piece in table.rows.pieces():
        total += piece[unseen[first : first + len(piece)]].double().sum(0)
    return (table.rows.sum(total) / int(unseen.sum())).float()
