"""From a retrained model to an inference model with packed rows."""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.distributed.sum_over_ranks import sum_over_ranks_
from torchrec_mpe.inference.agreement import check_agreement
from torchrec_mpe.inference.copy_around import copy_around
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.inference.probe import draw_probe, probe_ids
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.modules.row_quantizer import RetrainQuantizer
from torchrec_mpe.packing.choose_directory import directory_by_table
from torchrec_mpe.packing.pack import TableToPack, pack_tables

RowSource = Callable[[int, int], Tensor]
Collection = MPEEmbeddingBagCollection | ShardedMPEEmbeddingBagCollection


@torch.no_grad()
def emit_inference_model(
    model: nn.Module,
    *,
    output_dtype: torch.dtype = torch.float32,
    directory: str | Mapping[str, str] = "auto",
    probe: KeyedJaggedTensor | None = None,
) -> nn.Module:
    """A copy of a retrained model, in eval mode, whose collections hold packed rows.

    The rows are packed a few MiB at a time; no rank ever holds a whole table as float32. Neither they nor the dense
    network of ``model`` change. In a sharded model every rank takes part and gets the whole packed model.

    Before it returns, every packed collection is compared with the one that it was made from on a probe batch. An
    element may differ by 1e-5 of what its table's rows can reach, times the weight of the largest bag, in float32
    whatever ``output_dtype``: rounding stays far below, one wrong code far above.

    Args:
        model (nn.Module): in the retrain phase; DistributedModelParallel, sharded or unsharded.
        output_dtype (torch.dtype): of the pooled embeddings, float32, float16 or bfloat16.
        directory (Union[str, Mapping[str, str]]): how ids find rows, "ranked", "remap", "nibble" or "bitmap", for all
            tables or by table name; "auto", and for tables that are not named: whatever makes the table smallest.
        probe (Optional[KeyedJaggedTensor]): the batch to compare on, with the features of all collections; in a
            sharded model every rank brings its own. None: one with an empty bag, the first and last row of every
            table, of its bit-widths and of its runs, and rows between.

    Returns:
        nn.Module: the unwrapped model on its device, with PackedEmbeddingBagCollections in place of the trained ones.
            Other sharded modules in it, such as a ShardedEmbeddingCollection, are those of ``model``.

    Raises:
        RuntimeError: naming table and feature, if packed and retrained embeddings of the probe batch differ.
        ValueError: if there is no collection, or one is not in the retrain phase; naming the table, if a directory
            cannot store its bit-widths or is for no table, or if the probe batch does not fit.
    """
    source = get_unwrapped_module(model)
    collections = {name: module for name, module in source.named_modules() if isinstance(module, Collection)}
    if not collections:
        raise ValueError(f"{type(source).__name__} holds no MPEEmbeddingBagCollection")
    for name, module in collections.items():
        if module.phase is not Phase.RETRAIN:
            raise ValueError(
                f"collection {name or type(module).__name__} is in the {module.phase.value} phase: fix bit-widths with "
                "prepare_retrain_ and train before emitting"
            )
    names = [config.name for module in collections.values() for config in module.embedding_bag_configs()]
    chosen = directory_by_table(names, directory)
    packed = {module: _pack(module, output_dtype, chosen, probe) for module in collections.values()}
    return copy_around(source, packed)


def _pack(
    collection: Collection,
    output_dtype: torch.dtype,
    directory: Mapping[str, str],
    probe: KeyedJaggedTensor | None,
) -> PackedEmbeddingBagCollection:
    sharded = isinstance(collection, ShardedMPEEmbeddingBagCollection)
    configs = collection.embedding_bag_configs()
    tables: list[TableToPack] = []
    device = torch.device("cpu")
    for config in configs:
        quantizer = collection.quantizers()[config.embedding_dim]
        assert isinstance(quantizer, RetrainQuantizer)
        device = quantizer.beta.device
        rows = _sharded_rows(collection, config.name) if sharded else _whole_rows(collection, config.name)
        tables.append(
            TableToPack(
                config.name,
                quantizer.widths[config.name],
                rows,
                quantizer.step_size_of_width().float().cpu(),
                quantizer.beta.detach().float().cpu(),
                None if quantizer.zero_rows is None else quantizer.zero_row(config.name).float().cpu(),
                directory[config.name],
            )
        )
    packed = PackedEmbeddingBagCollection(configs, pack_tables(tables), collection.is_weighted(), device=device)
    if probe is None:
        ids = {table.name: probe_ids(table.widths) for table in tables}
        probe = draw_probe(configs, ids, collection.is_weighted(), device)
    check_agreement(collection, packed, probe.to(device))
    if output_dtype == torch.float32:
        return packed
    return PackedEmbeddingBagCollection(configs, packed.packed_tables(), collection.is_weighted(), output_dtype)


def _whole_rows(collection: MPEEmbeddingBagCollection, table: str) -> RowSource:
    weight: Tensor = collection.embedding_bags[table].weight
    return lambda start, stop: weight.detach()[start:stop].float().cpu()


def _sharded_rows(collection: ShardedMPEEmbeddingBagCollection, table: str) -> RowSource:
    """Rows put together from all ranks, which must ask for the same rows in the same order."""
    group = collection.process_group
    # Every rank holds all of a data-parallel table: one of them speaks.
    speaks = table not in collection.data_parallel_tables() or dist.get_rank(group) == 0
    shards = [shard for shard in collection.shards() if shard.name == table and speaks]
    dim = next(t.embedding_dim for t in collection.embedding_bag_configs() if t.name == table)

    def rows(start: int, stop: int) -> Tensor:
        chunk = torch.zeros(stop - start, dim)
        for shard in shards:
            low, high = max(start, shard.first_row), min(stop, shard.first_row + shard.rows)
            if low < high:
                columns = slice(shard.first_column, shard.first_column + shard.columns)
                chunk[low - start : high - start, columns] = shard.read(low - shard.first_row, high - shard.first_row)
        return sum_over_ranks_(chunk, group, collection.device)

    return rows
