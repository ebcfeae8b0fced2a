"""A trained model with transform-coded tables in place of its rows."""

import copy
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mpe.coding.code_tables import code_tables
from torchrec_mpe.coding.owned_rows import TableToCode
from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.inference.compress.evaluated import mean_over_ranks, ranks_of
from torchrec_mpe.inference.compress.rows import Collection, OwnedShards, owned_rows
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.inference.packed_table_batched_embedding_bags import PackedTableBatchedEmbeddingBags
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.packing.encode import coded_rows
from torchrec_mpe.packing.layout import END_PADDING
from torchrec_mpe.packing.pack import pack_tables
from torchrec_mpe.packing.pack_coded import CodedTableToPack
from torchrec_mpe.packing.table_coding import TableCoding
from torchrec_mpe.precision.counts_of_table import counts_of_table
from torchrec_mpe.precision.frequency_counter import FrequencyCounter
from torchrec_mpe.upstream.embedding_bag_collection import tables_of_sharded

Unseen = Literal["mean", "model"]
"""What rows without lookups read: the mean of the others by their lookups, or the mean of the model's own such rows."""

_TOLERANCE = 1e-5  # of what a table's rows can reach; float32's rounding stays far below, a wrong code far above
_SECOND_COLLECTION = END_PADDING + 4  # bytes that a collection has once: the end of its weights, and of run_offsets


@torch.no_grad()
def compress(
    model: nn.Module,
    counts: Mapping[str, Tensor],
    curvature: Mapping[str, Tensor] | None = None,
    *,
    ratio: float | None = None,
    bytes: int | None = None,
    max_components: int | None = None,
    unseen: Unseen = "mean",
    score: Callable[[nn.Module], float] | None = None,
    output_dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> nn.Module:
    """A copy of a trained model, in eval mode, whose tables are transform-coded to a number of bytes.

    Rows are rotated into the metric in which the loss sees them, and every component of every group of rows of similar
    counts gets a bit-width: :mod:`torchrec_mpe.coding`. Only rows change; :func:`torchrec_mpe.distill_` then lets the
    copy's dense network adapt to them. ``model`` stays as it is and may go on training.

    In a sharded model every rank takes part, reads the rows that it owns, and gets the whole packed model. Ranks send
    each other sums of [D, D], a sample of at most 2048 rows a group, and packed codes; columns that are split over
    ranks are put together a few MiB at a time. Before it returns, rows at the ends of groups are read back by the
    lookup and compared with what their codes stand for.

    Args:
        model (nn.Module): with EmbeddingBagCollections, plain, ours or cached, sharded in any way or not at all.
        counts (Mapping[str, Tensor]): by table, int64 [num_embeddings] lookups in training, for example a
            FrequencyCounter, which tables with MEAN pooling and weighted features need for its squared weights.
        curvature (Optional[Mapping[str, Tensor]]): by table, float64 [D, D], of
            :func:`torchrec_mpe.measure_curvature`; None: the identity, as if the loss saw all directions and tables
            alike, which costs accuracy.
        ratio (Optional[float]): compression against FP32 rows, for example 100; give this or ``bytes``.
        bytes (Optional[int]): of all packed tables.
        max_components (Optional[int]): K of a table at most, up to 16; None: 16 up to D = 32, else 8.
        unseen (str): "mean" or "model", what ids read that have no lookups; ignored with ``score``.
        score (Optional[Callable]): how good a model is, on validation rows, higher is better; called on every rank. The
            better of the two vectors for unseen ids is kept.
        output_dtype (torch.dtype): of the pooled embeddings, float32, float16 or bfloat16.
        progress (bool): show a progress bar.

    Returns:
        nn.Module: the unwrapped model on its device, with PackedEmbeddingBagCollections in place of its collections.

    Raises:
        KeyError: naming the table, if counts or curvature lack it.
        RuntimeError: naming table and row, if the lookup reads something else than a row's codes stand for.
        ValueError: if there is no collection; naming table and row, if a row is not finite; naming the table, if its
            counts or curvature do not fit; or saying how many bytes are needed, if the budget is too small.

    Example::

        curvature = mpe.measure_curvature(dmp, batches, num_batches=60)
        coded = mpe.compress(dmp, counts, curvature, ratio=100)
        mpe.distill_(coded, teacher=dmp, batches=batches)
        mpe.save(coded, "artifact")
    """
    source = get_unwrapped_module(model)
    collections = _collections(source)
    configs = [config for module in collections for config in _configs(module)]
    budget = _budget(configs, ratio, bytes) - _SECOND_COLLECTION * (len(collections) - 1)
    rows = {name: owned for module in collections for name, owned in owned_rows(module).items()}
    tables = [
        _to_code(config, rows[config.name], counts, curvature, weighted=module.is_weighted())
        for module in collections
        for config in _configs(module)
    ]
    coded = code_tables(tables, budget, max_components=max_components, progress=progress)
    codings = {name: found.coding for name, found in coded.items()}
    group, device = ranks_of(source)
    # deepcopy finds the packed collections in its memo and never touches the trained rows.
    memo = {id(module): _pack(module, codings, rows, device, output_dtype) for module in collections}
    compressed: nn.Module = copy.deepcopy(source, memo).eval()
    if score is None and unseen == "mean":
        return compressed
    others = {table.name: mean for table in tables if (mean := _mean_of_unseen(table)) is not None}
    if score is None:
        _read_unseen_(compressed, others)
    elif others:
        by_mean = score(compressed)
        before = _read_unseen_(compressed, others)
        by_model = score(compressed)
        first, second = mean_over_ranks(torch.tensor([by_mean, by_model]), group, device)
        if not second > first:
            _read_unseen_(compressed, before)
    return compressed


def _collections(source: nn.Module) -> list[Collection]:
    found = [m for m in source.modules() if isinstance(m, EmbeddingBagCollection | ShardedEmbeddingBagCollection)]
    if not found:
        raise ValueError(f"{type(source).__name__} holds no EmbeddingBagCollection")
    for module in found:
        ours = isinstance(module, MPEEmbeddingBagCollection | ShardedMPEEmbeddingBagCollection)
        if ours and module.phase is not Phase.PLAIN:
            raise ValueError(
                f"tables {', '.join(c.name for c in _configs(module))} are in the {module.phase.value} phase: compress "
                "takes rows that were trained as fp32; pack these with emit_inference_model"
            )
    return found


def _configs(collection: Collection) -> list[EmbeddingBagConfig]:
    if isinstance(collection, ShardedEmbeddingBagCollection):
        return tables_of_sharded(collection)
    configs: list[EmbeddingBagConfig] = collection.embedding_bag_configs()
    return configs


def _budget(configs: list[EmbeddingBagConfig], ratio: float | None, bytes: int | None) -> int:
    if (ratio is None) == (bytes is None):
        raise ValueError("give one of ratio and bytes")
    if bytes is not None:
        return bytes
    assert ratio is not None
    if not 1 < ratio < math.inf:
        raise ValueError(f"the ratio must be above 1, got {ratio}")
    return int(sum(4 * c.num_embeddings * c.embedding_dim for c in configs) / ratio)


def _to_code(
    config: EmbeddingBagConfig,
    rows: OwnedShards,
    counts: Mapping[str, Tensor],
    curvature: Mapping[str, Tensor] | None,
    *,
    weighted: bool,
) -> TableToCode:
    weights = counts.squared_weights.get(config.name) if isinstance(counts, FrequencyCounter) else None
    if weights is None and (weighted or config.pooling == PoolingType.MEAN):
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
    collection: Collection,
    codings: Mapping[str, TableCoding],
    rows: Mapping[str, OwnedShards],
    device: torch.device,
    output_dtype: torch.dtype,
) -> PackedEmbeddingBagCollection:
    configs = _configs(collection)
    tables = [
        CodedTableToPack(config.name, codings[config.name], rows[config.name].pieces, rows[config.name].sum)
        for config in configs
    ]
    packed = pack_tables(tables)
    collected = PackedEmbeddingBagCollection(configs, packed, collection.is_weighted(), device=device)
    for config in configs:
        _check_rows(collected, config.name, codings[config.name], rows[config.name])
    if output_dtype == torch.float32:
        return collected
    return PackedEmbeddingBagCollection(configs, collected.packed_tables(), collection.is_weighted(), output_dtype)


def _check_rows(packed: PackedEmbeddingBagCollection, name: str, coding: TableCoding, rows: OwnedShards) -> None:
    """Compare what the lookup reads of the first and last row of each group with what their codes stand for."""
    places = torch.tensor([place for pair in pairwise(coding.bounds) for place in (pair[0], pair[1] - 1)])
    ids = places if coding.order is None else coding.order.cpu().long().argsort()[places]
    distinct = ids.unique()
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
    wrong = ((read - want).abs().amax(1) > _TOLERANCE * reach).nonzero()
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


def _read_unseen_(model: nn.Module, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let rows without bits of coded tables read these vectors, by table; returns those that they read before."""
    before: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, PackedEmbeddingBagCollection):
            packed = module.packed_tables()
            for table, start in zip(packed.tables, packed.zero_row_offsets.tolist(), strict=True):
                if start >= 0 and table.name in vectors:
                    own = packed.zero_rows[start : start + table.embedding_dim]
                    before[table.name] = own.clone()
                    own.copy_(vectors[table.name])
    return before
