"""State of the optimizers fused into FBGEMM's TBEs, and which of it can move between two shardings."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ParameterSharding
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.distributed.cached_embedding_kernel import CachedFusedOptimizer
from torchrec_mpe.distributed.checkpoint.cached_tables import (
    cached_plans,
    describe_stores,
    is_cached,
    optimizer_and_states,
)
from torchrec_mpe.upstream.optimizers import tbe_of
from torchrec_mpe.upstream.sharded_tensor import ShardedTensor
from torchrec_mpe.upstream.tbe import set_steps


def fused_state(model: DistributedModelParallel) -> dict[str, Tensor]:
    """State tensors of this rank's shards, ``<parameter>.<table>.<state>``, in the TBEs' memory."""
    # Which tables a rank has differs by rank: nothing here may be collective.
    state: dict[str, Tensor] = {}
    for parameter, tensors in model.fused_optimizer.state_dict()["state"].items():
        state.update({f"{parameter}.{name}": tensor for name, tensor in tensors.items()})
    return state


def fused_numbers(model: DistributedModelParallel) -> dict[str, Tensor]:
    """Steps taken and learning rate of each table of this rank, float64 [2] by parameter name."""
    numbers: dict[str, Tensor] = {}
    for parameters, optimizer in _fused_optimizers(model.fused_optimizer):
        tbe: Any = tbe_of(optimizer)
        has_steps = isinstance(tbe, SplitTableBatchedEmbeddingBagsCodegen | CachedTableBatchedEmbeddingBags)
        steps = int(tbe.iter.item()) if has_steps else 0
        pair = torch.tensor([steps, tbe.get_learning_rate()], dtype=torch.float64)
        numbers.update(dict.fromkeys(parameters, pair))
    return numbers


def fused_hyperparameters(model: DistributedModelParallel) -> dict[str, Tensor]:
    """Numbers of the parameter group of each table of this rank, float64 [], ``<parameter>.<hyperparameter>``.

    The learning rate is that of the next step: the TBE is told of it only when that begins. Schedulers add others.
    """
    numbers: dict[str, Tensor] = {}
    for parameters, optimizer in _fused_optimizers(model.fused_optimizer):
        for group in optimizer.param_groups:
            for key, value in group.items():
                if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
                    number = torch.tensor(float(value), dtype=torch.float64)
                    numbers.update({f"{parameter}.{key}": number for parameter in parameters})
    return numbers


def set_fused_hyperparameters(model: DistributedModelParallel, numbers: Mapping[str, Tensor]) -> None:
    """Set the parameter groups to what :func:`fused_hyperparameters` returned, those of tables that are in it."""
    for parameters, optimizer in _fused_optimizers(model.fused_optimizer):
        found: dict[str, float] = {}
        for name, number in numbers.items():
            parameter, _, key = name.rpartition(".")
            if parameter in parameters:
                found[key] = max(float(number), found.get(key, -math.inf))
        for group in optimizer.param_groups:
            for key, value in found.items():
                kind = type(group[key]) if isinstance(group.get(key), bool | int) else float
                group[key] = kind(value)


def set_fused_numbers(model: DistributedModelParallel, numbers: Mapping[str, Tensor], fresh: set[str]) -> None:
    """Set steps and learning rates to what :func:`fused_numbers` returned; ``fresh`` parameters are at step 0."""
    for parameters, optimizer in _fused_optimizers(model.fused_optimizer):
        tbe = tbe_of(optimizer)
        learning_rate = max(float(numbers[p][1]) for p in parameters)
        steps = max(0 if p in fresh else int(numbers[p][0]) for p in parameters)
        tbe.set_learning_rate(learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        if isinstance(tbe, CachedTableBatchedEmbeddingBags):
            tbe.set_optimizer_step(steps)
        elif isinstance(tbe, SplitTableBatchedEmbeddingBagsCodegen):
            set_steps(tbe, steps)


def clear_fused_state(state: Mapping[str, Tensor]) -> None:
    """Zero state tensors of :func:`fused_state`, sharded or not, in place."""
    for tensor in state.values():
        for local in local_tensors(tensor):
            local.zero_()


def describe_tables(model: DistributedModelParallel, state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """How each table is sharded, and the fused optimizer of those that have a shard here, by parameter name.

    Args:
        model (DistributedModelParallel): the model.
        state_dict (Mapping[str, Tensor]): of the model; its keys are the same on every rank.

    Returns:
        Dict[str, Dict[str, Any]]: JSON values: ``sharding_type``, ``compute_kernel``, ``columns`` (the widths of its
            column shards, first to last), ``optimizer`` (None without a fused one) and ``state`` (sizes by name); of a
            cached table ``state`` is as :func:`describe_stores` has it, and ``wide_rows`` a digest or None.
    """
    tables: dict[str, dict[str, Any]] = {}
    for key in state_dict:
        parts = key.split(".")
        if parts[-1] != "weight" or len(parts) < 3:
            continue
        module_plan = model.plan.plan.get(".".join(parts[:-3]), {})
        if parts[-2] in module_plan:
            tables[key] = _describe(module_plan[parts[-2]], global_size(state_dict[key])[1])
    for name, sharding, wide_rows in cached_plans(model):
        tables[name] = {**_describe(sharding, 0), "wide_rows": wide_rows}  # always has a sharding spec
    for parameters, optimizer in _fused_optimizers(model.fused_optimizer):
        for parameter in parameters:
            tables[parameter]["optimizer"] = tbe_of(optimizer).optimizer.value
    for parameter, tensors in model.fused_optimizer.state_dict()["state"].items():
        tables[parameter]["state"] = {name: list(global_size(tensor)) for name, tensor in tensors.items()}
    for parameter, stored in describe_stores(model):
        tables[parameter]["state"] = stored
    return tables


def merge_descriptions(by_rank: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One description of all tables: what only the ranks that have a shard know is taken from them."""
    merged = {name: dict(table) for name, table in by_rank[0].items()}
    for tables in by_rank[1:]:
        for name, table in tables.items():
            if table["optimizer"] is not None:
                merged[name] = dict(table)
    return merged


def immovable(saved: Mapping[str, Mapping[str, Any]], here: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The tables whose fused optimizer state does not fit their sharding here, and why.

    State of one number per element, or per row of a table whose rows are whole, belongs to rows and moves with them.
    Under column-wise sharding each column shard has its own number per row: other numbers than those of whole rows,
    which fit the same column shards only.

    Args:
        saved, here (Mapping[str, Mapping[str, Any]]): all tables, as :func:`merge_descriptions` returns them.
    """
    reasons: dict[str, str] = {}
    for name, table in here.items():
        if name not in saved:
            continue
        before = saved[name]
        if before["optimizer"] != table["optimizer"]:
            if before["state"] or table["state"]:
                reasons[name] = f"{_kind(before)} when saved, {_kind(table)} here"
            continue
        same_columns = before["columns"] == table["columns"]
        for state in sorted({*before["state"], *table["state"]}):
            size, wanted = before["state"].get(state), table["state"].get(state)
            if size != wanted or not (same_columns or len(size) == 2):
                reasons[name] = (
                    f"{_kind(before)} of {_columns(before)} when saved, {_kind(table)} of {_columns(table)} here"
                )
    return reasons


def refusal(reasons: Mapping[str, str]) -> str:
    """What to tell a user whose optimizer state cannot be moved."""
    lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    return (
        f"the fused optimizer state of {len(reasons)} tables cannot be moved to their sharding here:\n{lines}\n"
        "Load under the sharding that saved it, or go on without it: optimizer_state='where possible' lets these "
        "tables, optimizer_state=False all tables start with an empty optimizer state, as after a reset: with Adagrad "
        "the first steps of their rows are as large as at the start of training"
    )


def global_size(tensor: Tensor) -> tuple[int, ...]:
    """Shape of a tensor, of all shards together."""
    # ShardedTensor.shape warns that ShardedTensor is to go.
    return tuple(tensor.metadata().size if isinstance(tensor, ShardedTensor) else tensor.shape)


def local_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors of this rank's shards of a ShardedTensor or DTensor, or the tensor itself."""
    if isinstance(tensor, ShardedTensor):
        return [shard.tensor for shard in tensor.local_shards()]
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return list(local.local_shards()) if hasattr(local, "local_shards") else [local]


def _fused_optimizers(
    optimizer: KeyedOptimizer, prefix: str = ""
) -> Iterator[tuple[list[str], EmbeddingFusedOptimizer | CachedFusedOptimizer]]:
    """The optimizer of each TBE, with the full names of its parameters."""
    if isinstance(optimizer, CombinedOptimizer):
        for name, inner in optimizer.optimizers:
            yield from _fused_optimizers(inner, f"{prefix}{name}." if name else prefix)
    elif isinstance(optimizer, EmbeddingFusedOptimizer | CachedFusedOptimizer):
        yield [f"{prefix}{name}" for name in optimizer.params], optimizer


def _describe(sharding: ParameterSharding, embedding_dim: int) -> dict[str, Any]:
    columns = [embedding_dim]
    if sharding.sharding_spec is not None:
        shards = sharding.sharding_spec.shards
        widths = {shard.shard_offsets[1]: shard.shard_sizes[1] for shard in shards}
        columns = [widths[offset] for offset in sorted(widths)]
    return {
        "sharding_type": sharding.sharding_type,
        "compute_kernel": sharding.compute_kernel,
        "columns": columns,
        "optimizer": None,
        "state": {},
    }


def _kind(table: Mapping[str, Any]) -> str:
    if is_cached(table):
        return f"{table['sharding_type']} and cached with {optimizer_and_states(table)} a row"
    return f"{table['sharding_type']} with {table['optimizer'] or 'no fused optimizer'}"


def _columns(table: Mapping[str, Any]) -> str:
    return "whole rows" if len(table["columns"]) == 1 else f"column shards {table['columns']}"
