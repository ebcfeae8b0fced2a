"""Other objects with a state, such as learning-rate schedulers: numbers into the manifest, tensors beside the rows."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from torchrec_mpe.distributed.checkpoint.checkpoint import Checkpoint
from torchrec_mpe.distributed.checkpoint.fused_optimizer import global_size
from torchrec_mpe.distributed.checkpoint.tensor_names import without_prefix
from torchrec_mpe.upstream.checkpoint import SavedTensor

# Dictionaries whose keys are not all text, as lists of pairs: MultiStepLR counts its milestones in a Counter.
_PAIRS: dict[str, Callable[[Iterable[tuple[Any, Any]]], dict[Any, Any]]] = {
    "__dict__": dict,
    "__counter__": lambda pairs: Counter(dict(pairs)),
}


def extra_state(extra: Mapping[str, Stateful]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name ``extra.<name>.<key>``, sharded or not, and JSON values by name.

    Collective if a ``state_dict`` is: every rank calls it with the same names.

    Raises:
        TypeError: for a value that is neither a tensor at the top level nor of a JSON type.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name in sorted(extra):
        state = extra[name].state_dict()
        tensors.update({_key(name, key): value for key, value in state.items() if isinstance(value, Tensor)})
        values[name] = as_json(name, {key: value for key, value in state.items() if not isinstance(value, Tensor)})
    return tensors, values


def check_extra(
    extra: Mapping[str, Stateful],
    tensors: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    saved: Mapping[str, SavedTensor],
    rank: int,
    world_size: int,
) -> None:
    """Make sure that a checkpoint has the state of some objects, whose present tensors are given.

    Raises:
        KeyError: if it has not.
        ValueError: if a tensor has another shape, or a schedule other parameter groups.
    """
    for name in extra:
        if name not in checkpoint.manifest["extra"]:
            known = ", ".join(sorted(checkpoint.manifest["extra"])) or "none"
            raise KeyError(f"the checkpoint {checkpoint.path} has no state of {name!r}; it has: {known}")
        rates = _values(name, checkpoint, rank, world_size).get("base_lrs")
        optimizer = getattr(extra[name], "optimizer", None)
        if rates is not None and optimizer is not None and len(rates) != len(optimizer.param_groups):
            raise ValueError(
                f"the schedule {name!r} has learning rates of {len(rates)} parameter groups in the checkpoint, its "
                f"optimizer here has {len(optimizer.param_groups)}: shard the tables as when it was saved, or give "
                "rows and dense network a schedule each and leave that of the rows out of extra="
            )
    for key, tensor in tensors.items():
        if key not in saved:
            raise KeyError(f"the checkpoint {checkpoint.path} has no {key}")
        if saved[key].size != global_size(tensor):
            raise ValueError(f"{key} has shape {global_size(tensor)}, in the checkpoint it is {saved[key].size}")


def of_ranks(by_rank: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Each rank's values of the objects that have not the same everywhere.

    A schedule has a learning rate for each parameter group, and ranks with other tables have other groups.

    Args:
        by_rank (Sequence[Mapping[str, Any]]): values as :func:`extra_state` returned them on each rank.
    """
    return {
        name: [values[name] for values in by_rank]
        for name in by_rank[0]
        if any(values[name] != by_rank[0][name] for values in by_rank)
    }


def set_extra(
    extra: Mapping[str, Stateful], tensors: Mapping[str, Tensor], checkpoint: Checkpoint, rank: int, world_size: int
) -> None:
    """Give each object its state back; the tensors are those of :func:`extra_state`, loaded.

    Where ranks had different values each gets its own, under another world size rank 0's.
    """
    for name in sorted(extra):
        loaded = without_prefix(_key(name, ""), tensors)
        extra[name].load_state_dict({**from_json(_values(name, checkpoint, rank, world_size)), **loaded})


def _values(name: str, checkpoint: Checkpoint, rank: int, world_size: int) -> Any:
    by_rank = checkpoint.manifest.get("extra_of_ranks", {})
    if name not in by_rank:
        return checkpoint.manifest["extra"][name]
    return by_rank[name][rank if world_size == checkpoint.world_size else 0]


def as_json(name: str, value: Any) -> Any:
    """A value of JSON types; tuples become lists, and dictionaries may have numbers as keys.

    Raises:
        TypeError: for any other type, saying where it is.
    """
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and not isinstance(value, Counter):
            return {key: as_json(f"{name}.{key}", v) for key, v in value.items()}
        kind = "__counter__" if isinstance(value, Counter) else "__dict__"
        return {kind: [[as_json(name, key), as_json(f"{name}.{key}", v)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return [as_json(f"{name}[{k}]", v) for k, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}: only numbers, text, lists and dictionaries of them are saved")


def from_json(value: Any) -> Any:
    """What :func:`as_json` was given, with lists for tuples."""
    if isinstance(value, dict):
        for kind, made_of in _PAIRS.items():
            if set(value) == {kind}:
                return made_of((from_json(key), from_json(v)) for key, v in value[kind])
        return {key: from_json(v) for key, v in value.items()}
    return [from_json(v) for v in value] if isinstance(value, list) else value


def _key(name: str, key: str) -> str:
    return f"extra.{name}.{key}"
