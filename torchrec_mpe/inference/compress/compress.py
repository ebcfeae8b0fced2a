"""A trained model with transform-coded tables in place of its rows."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.inference.compress.code_collections import CollectionToCode, code_collections
from torchrec_mpe.inference.compress.evaluated import mean_over_ranks, ranks_of
from torchrec_mpe.inference.compress.rows import Collection, owned_rows
from torchrec_mpe.inference.copy_around import copy_around
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.upstream.embedding_bag_collection import is_weighted, tables_of_sharded

Unseen = Literal["mean", "model"]
"""What rows without lookups read: the mean of the others by their lookups, or the mean of the model's own such rows."""


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
            Other sharded modules in it, such as a ShardedEmbeddingCollection, are those of ``model``.

    Raises:
        KeyError: naming the table, if counts or curvature lack it.
        RuntimeError: naming table and row, if the lookup reads something else than a row's codes stand for.
        ValueError: if there is no collection; naming table and row, if a row is not finite; naming the table, if its
            counts or curvature do not fit; if ranks were given different ones; or saying how many bytes are needed, if
            the budget is too small.

    Example::

        curvature = mpe.measure_curvature(dmp, batches, num_batches=60)
        coded = mpe.compress(dmp, counts, curvature, ratio=100)
        mpe.distill_(coded, teacher=dmp, batches=batches)
        mpe.save(coded, "artifact")
    """
    source = get_unwrapped_module(model)
    collections = collections_of(source)
    group, device = ranks_of(model)
    to_code = [CollectionToCode(configs_of(m), owned_rows(m), is_weighted(m), device, group) for m in collections]
    coded = code_collections(
        to_code,
        counts,
        curvature,
        ratio=ratio,
        bytes=bytes,
        max_components=max_components,
        output_dtype=output_dtype,
        progress=progress,
    )
    compressed = copy_around(source, dict(zip(collections, coded.packed, strict=True)))
    if score is None:
        if unseen == "model":
            read_unseen_(compressed, coded.unseen_means())
    elif means := coded.unseen_means():
        by_mean = score(compressed)
        before = read_unseen_(compressed, means)
        by_model = score(compressed)
        first, second = mean_over_ranks(torch.tensor([by_mean, by_model]), group, device)
        if not second > first:
            read_unseen_(compressed, before)
    return compressed


def collections_of(source: nn.Module) -> list[Collection]:
    """The collections of a model, of which each has fp32 rows.

    Raises:
        ValueError: if there is none, or its rows are trained at other bit-widths.
    """
    found = [m for m in source.modules() if isinstance(m, EmbeddingBagCollection | ShardedEmbeddingBagCollection)]
    if not found:
        raise ValueError(f"{type(source).__name__} holds no EmbeddingBagCollection")
    for module in found:
        ours = isinstance(module, MPEEmbeddingBagCollection | ShardedMPEEmbeddingBagCollection)
        if ours and module.phase is not Phase.PLAIN:
            raise ValueError(
                f"tables {', '.join(c.name for c in configs_of(module))} are in the {module.phase.value} phase: "
                "compress takes rows that were trained as fp32; pack these with emit_inference_model"
            )
    return found


def configs_of(collection: Collection) -> list[EmbeddingBagConfig]:
    """Its tables, sharded or not."""
    if isinstance(collection, ShardedEmbeddingBagCollection):
        return tables_of_sharded(collection)
    configs: list[EmbeddingBagConfig] = collection.embedding_bag_configs()
    return configs


def read_unseen_(model: nn.Module, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
