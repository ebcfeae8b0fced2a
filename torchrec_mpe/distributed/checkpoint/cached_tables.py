"""What checkpoints hold of cached tables beside their stores, and which stores fit which sharding.

The stores themselves, with the optimizer state of their rows, are in the model's state dict.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module

from torchrec_mpe.distributed.cached_embedding_kernel import CACHED_KERNEL
from torchrec_mpe.distributed.cached_embeddingbag import ShardedCachedEmbeddingBagCollection
from torchrec_mpe.distributed.cached_state import CachedShard, check_idle
from torchrec_mpe.ops.cache_tensors import STATE_BYTES, StoredRow


def cache_progress(model: nn.Module) -> dict[str, Tensor]:
    """Batch number and counters of every cached shard of this rank, int64 [7].

    Names are ``<parameter>.<first row>.<first column>``. With the stores they make training go on bit for bit: rounding
    draws its random numbers by batch number.
    """
    return {
        f"{parameter}.{shard.first_row}.{shard.first_column}": shard.progress().clone()
        for parameter, shard, _ in _cached_shards(model)
    }


def cache_progress_targets(model: nn.Module, saved: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Empty tensors for the :func:`cache_progress` that a checkpoint has of the tables of this rank, by key."""
    parameters = {parameter for parameter, _, _ in _cached_shards(model)}
    return {
        key: torch.empty(7, dtype=torch.int64)
        for key in saved
        if key.startswith(prefix) and _parameter_of(key.removeprefix(prefix)) in parameters
    }


def set_cache_progress(model: nn.Module, loaded: Mapping[str, Tensor]) -> None:
    """Take over :func:`cache_progress`, once the stores are loaded.

    Where the shards are others than when saved, all go on from the highest batch number, and the first has the sums of
    the counters.
    """
    caches = {}
    for parameter, shard, places in _cached_shards(model):
        of_table = {key: t for key, t in loaded.items() if _parameter_of(key) == parameter}
        if not of_table:
            continue
        place = (shard.first_row, shard.first_column)
        if {f"{parameter}.{row}.{column}" for row, column in places} == of_table.keys():
            progress = of_table[f"{parameter}.{place[0]}.{place[1]}"]
        else:
            every = torch.stack(list(of_table.values()))
            progress = every.sum(0) if place == (0, 0) else torch.zeros_like(every[0])
            progress[0] = every[:, 0].max()
        shard.progress().copy_(progress)
        caches[id(shard.emb_module)] = shard.emb_module
    for cache in caches.values():
        cache.checkpoint_loaded()


def clear_cached_optimizer_state(model: nn.Module, fresh: set[str]) -> None:
    """Zero the optimizer state of the rows of some parameters, in their stores."""
    for parameter, shard, _ in _cached_shards(model):
        if parameter in fresh:
            stored = shard.stored()
            for bits in (4, 8):
                if f"rows{bits}" in stored:
                    stored[f"rows{bits}"][:, StoredRow(bits, shard.columns).bytes :] = 0


def check_cached_tables(saved: Mapping[str, Mapping[str, Any]], here: Mapping[str, Mapping[str, Any]]) -> None:
    """Make sure that stores fit the sharding that they are to be loaded into.

    Args:
        saved, here (Mapping[str, Mapping[str, Any]]): all tables, as merge_descriptions returns them.

    Raises:
        ValueError: naming the table, if it was cached and is not or the other way round, its columns are sharded in
            another way, other rows have 8 bits, or its rows' optimizer state has another size.
    """
    for name, table in saved.items():
        if is_cached(table) and not here:
            raise ValueError(
                f"{name} was cached when saved: load it into a CachedEmbeddingBagCollection that is sharded"
            )
    for name, table in here.items():
        before = saved.get(name, table)
        cached = [is_cached(t) for t in (before, table)]
        if cached[0] != cached[1]:
            raise ValueError(
                f"{name} is {'' if cached[1] else 'not '}cached here and was {'' if cached[0] else 'not '}when saved: "
                "quantized and fp32 rows are not loaded into each other, shard it as it was"
            )
        if not cached[1]:
            continue
        if before["columns"] != table["columns"]:
            raise ValueError(
                f"{name} is cached in column shards {table['columns']} here and {before['columns']} when saved, and "
                "each column shard's rows have a scale of their own: load it into the same column shards"
            )
        if before.get("wide_rows") != table["wide_rows"]:
            raise ValueError(
                f"{name} stores other rows in 8 bits here than when saved: give the CachedEmbeddingBagCollection the "
                "precision plan that it was trained with"
            )
        sizes = [_state_bytes(t) for t in (before, table)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{name} is cached, and its stored rows hold their optimizer state, {sizes[1]} bytes a row here "
                f"({optimizer_and_states(table)}) and {sizes[0]} when saved ({optimizer_and_states(before)}): rows of "
                "another size cannot be loaded, with any optimizer_state; take the optimizer and optimizer_state_dtype "
                "that saved it"
            )


def check_no_batch_in_flight(model: nn.Module) -> None:
    """Make sure that rows may be set in all cached tables of this rank.

    Raises:
        RuntimeError: naming the tables, if one of their batches waits for its backward.
    """
    check_idle(shard for _, shard, _ in _cached_shards(model))


def describe_stores(model: DistributedModelParallel) -> Iterator[tuple[str, dict[str, list[Any]]]]:
    """Parameter name and ``state`` of each cached table of this rank: [elements a row, how they are stored] by name.

    Where the columns are sharded, elements of whole rows are counted, or 1 for a state of one number a shard's row.
    """
    for path, collection in _collections(model):
        columns = {table.name: table.embedding_dim for table in collection.embedding_bag_configs()}
        for shard in collection.cached_shards():
            states = shard.emb_module.stored_states(shard.table)
            yield (
                f"{path}embedding_bags.{shard.name}.weight",
                {f"state{k}": [1 if n == 1 else columns[shard.name], how] for k, (n, how) in enumerate(states)},
            )


def optimizer_and_states(table: Mapping[str, Any]) -> str:
    """The fused optimizer of a cached table, and how its states are stored, in words."""
    states = " and ".join(f"{elements} of {dtype}" for elements, dtype in table["state"].values())
    return f"{table['optimizer']} with {states or 'no state'}"


def cached_plans(model: DistributedModelParallel) -> Iterator[tuple[str, Any, int | None]]:
    """Parameter name, sharding and digest of wide rows of each cached table, the same on every rank."""
    for path, collection in _collections(model):
        for table in collection.cached_tables():
            name = f"{path}embedding_bags.{table}.weight"
            yield name, collection.module_sharding_plan[table], collection.wide_rows_digest(table)


def _collections(model: nn.Module) -> Iterator[tuple[str, ShardedCachedEmbeddingBagCollection]]:
    for name, module in get_unwrapped_module(model).named_modules():
        if isinstance(module, ShardedCachedEmbeddingBagCollection):
            yield f"{name}." if name else "", module


def _cached_shards(model: nn.Module) -> Iterator[tuple[str, CachedShard, set[tuple[int, int]]]]:
    """Parameter name, this rank's shard, and first row and column of all shards of its table."""
    for path, collection in _collections(model):
        for shard in collection.cached_shards():
            spec = collection.module_sharding_plan[shard.name].sharding_spec
            places = {(part.shard_offsets[0], part.shard_offsets[1]) for part in spec.shards}
            yield f"{path}embedding_bags.{shard.name}.weight", shard, places


def _state_bytes(table: Mapping[str, Any]) -> int:
    """Bytes of optimizer state in a row of a cached table; with column shards, of all shards' parts of it."""
    parts = len(table["columns"])
    return sum((parts if n == 1 else n) * STATE_BYTES[dtype] for n, dtype in table["state"].values())


def is_cached(table: Mapping[str, Any]) -> bool:
    """Whether a description is of a cached table."""
    return bool(table["compute_kernel"] == CACHED_KERNEL.value)


def _parameter_of(key: str) -> str:
    return key.rsplit(".", 2)[0]
