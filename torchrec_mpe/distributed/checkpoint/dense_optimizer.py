"""State of a torch optimizer by parameter name, so that it can be loaded on any number of ranks."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchrec_mpe.upstream.checkpoint import SavedTensor
from torchrec_mpe.upstream.sharded_tensor import Shard, ShardedTensor, like_shards_of

STATE = "optimizer."
NUMBER = "optimizer_number."


class DenseOptimizers:
    """Torch optimizers over the parameters of a model that no fused optimizer updates.

    State of replicated parameters is replicated; that of a sharded table (dense kernel) is sharded like the table.

    Args:
        optimizers (List[torch.optim.Optimizer]): built-in or other, whose state are tensors and numbers.
        parameters (Mapping[str, nn.Parameter]): the model's, by name.
        state_dict (Mapping[str, Tensor]): the model's; tells which parameters are shards of what.
        tables (Collection[str]): names of the sharded collections' tables, some of which may be among the parameters.

    Raises:
        ValueError: if an optimizer has a parameter that the model has not.
    """

    def __init__(
        self,
        optimizers: list[torch.optim.Optimizer],
        parameters: Mapping[str, nn.Parameter],
        state_dict: Mapping[str, Tensor],
        tables: Collection[str],
    ) -> None:
        self._optimizers = optimizers
        self._tables = tables
        self._state_dict = state_dict
        self._name = {id(parameter): name for name, parameter in parameters.items()}
        for parameter in (p for o in optimizers for group in o.param_groups for p in group["params"]):
            if id(parameter) not in self._name:
                raise ValueError(
                    f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not the model's: make "
                    "the optimizer from the sharded model's named_parameters()"
                )

    def tensors(self) -> dict[str, Tensor]:
        """All state as tensors to save, those of sharded tables as ShardedTensors.

        Raises:
            TypeError: for state that is neither tensor nor number.
        """
        found: dict[str, Tensor] = {}
        for optimizer in self._optimizers:
            for parameter, state in optimizer.state.items():
                name = self._name.get(id(parameter))
                if name is None:  # a wrapper's own
                    continue
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        found[f"{STATE}{name}.{key}"] = self._sharded(name, key, value, parameter)
                    elif isinstance(value, bool | int | float):
                        dtype = torch.float64 if isinstance(value, float) else torch.int64
                        found[f"{NUMBER}{name}.{key}"] = torch.tensor(value, dtype=dtype)
                    elif value is not None:
                        raise TypeError(
                            f"{type(optimizer).__name__}'s state {key!r} of parameter {name} is a "
                            f"{type(value).__name__}: only tensors and numbers can be saved"
                        )
        return found

    def hyperparameters(self) -> list[list[dict[str, Any]]]:
        """Each optimizer's parameter groups: learning rate and the rest as JSON values, and parameters but for tables.

        Raises:
            TypeError: for a hyperparameter that JSON has no form for.
        """
        return [[self._group(group) for group in optimizer.param_groups] for optimizer in self._optimizers]

    def check(self, saved: list[list[dict[str, Any]]]) -> None:
        """Compare with what :meth:`hyperparameters` returned when saving.

        Raises:
            ValueError: if optimizers, parameter groups or their parameters differ.
        """
        here = [[group["params"] for group in groups] for groups in self.hyperparameters()]
        before = [[group["params"] for group in groups] for groups in saved]
        if here == before:
            return
        if not saved:
            raise ValueError("the checkpoint has no dense optimizer: give none, or None to begin with a fresh one")
        names = {name for groups in (*here, *before) for group in groups for name in group}
        differing = sorted(name for name in names if _place(here, name) != _place(before, name))
        raise ValueError(
            f"the optimizer has {[len(groups) for groups in here]} parameter groups, the saved one "
            f"{[len(groups) for groups in before]}; these parameters are not in the same one: "
            f"{', '.join(differing[:5]) or 'none'}{' and others' if len(differing) > 5 else ''}"
        )

    def targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor]:
        """Empty tensors for all state that a checkpoint has of these parameters."""
        parameters = {
            self._name[id(p)]: p for o in self._optimizers for group in o.param_groups for p in group["params"]
        }
        found: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}
        for key, entry in saved.items():
            name, state = _split(key)
            if name not in parameters:
                continue
            parameter, dtype = parameters[name], entry.dtype
            if len(entry.size) and isinstance(self._state_dict.get(name), ShardedTensor):
                empty = self._loaded[key] = torch.empty_like(parameter.detach(), dtype=dtype)
                found[key] = self._sharded(name, state, empty, parameter)
            else:
                # Step counts are on the CPU; the optimizer itself moves what it wants elsewhere.
                device = parameter.device if len(entry.size) else torch.device("cpu")
                found[key] = self._loaded[key] = torch.empty(entry.size, dtype=dtype, device=device)
        return found

    def set(self, saved: list[list[dict[str, Any]]]) -> None:
        """Set state to what was loaded into :meth:`targets`, hyperparameters to those of :meth:`hyperparameters`."""
        states: dict[str, dict[str, Any]] = {}
        for key, value in self._loaded.items():
            name, state = _split(key)
            states.setdefault(name, {})[state] = value.item() if key.startswith(NUMBER) else value
        for optimizer, groups in zip(self._optimizers, saved, strict=True):
            names = [self._name[id(p)] for group in optimizer.param_groups for p in group["params"]]
            numbers = iter(range(len(names)))
            restored = [
                {
                    **group,
                    **{key: _like(group.get(key), v) for key, v in before.items()},
                    "params": [next(numbers) for _ in group["params"]],
                }
                for group, before in zip(optimizer.param_groups, groups, strict=True)
            ]
            state_by_number = {k: states[name] for k, name in enumerate(names) if name in states}
            _load_in_place(optimizer, {"state": state_by_number, "param_groups": restored})

    def _sharded(self, name: str, key: str, value: Tensor, parameter: Tensor) -> Tensor:
        """The state of a table's local shards as a ShardedTensor of the table; other state as it is."""
        table = self._state_dict.get(name)
        if value.dim() == 0 or not isinstance(table, ShardedTensor | DTensor):
            return value
        if isinstance(table, DTensor):
            raise TypeError(
                f"table {name} has a dense kernel and DTensor output, whose optimizer state cannot be saved"
            )
        if value.shape != parameter.shape:
            raise TypeError(
                f"optimizer state {key!r} of the sharded table {name} is of shape {tuple(value.shape)}, its shards are "
                f"{tuple(parameter.shape)}: only state of the table's own shape can be saved"
            )
        shards = table.local_shards()
        parts = value.detach().split([shard.tensor.shape[0] for shard in shards])
        local = [Shard(part, shard.metadata) for part, shard in zip(parts, shards, strict=True)]
        return like_shards_of(table, local)

    def _group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        # Without tables: whether one is here depends on rank and sharding.
        names = [self._name[id(p)] for p in group["params"]]
        return {
            "params": sorted(name for name in names if name not in self._tables),
            **{key: _as_json(key, value) for key, value in group.items() if key != "params"},
        }


def _load_in_place(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """``load_state_dict`` into the objects that wrappers and schedules of the optimizer hold, and not into new ones."""
    state, groups = optimizer.state, optimizer.param_groups
    updated = {parameter for group in groups for parameter in group["params"]}
    optimizer.load_state_dict(state_dict)
    for parameter in updated:
        state.pop(parameter, None)
    state.update(optimizer.state)
    for group, loaded in zip(groups, optimizer.param_groups, strict=True):
        group.clear()
        group.update(loaded)
    optimizer.state, optimizer.param_groups = state, groups


def _split(key: str) -> tuple[str, str]:
    """Parameter name and state name of a key; no parameter for the key of something else."""
    for prefix in (STATE, NUMBER):
        if key.startswith(prefix):
            name, _, state = key.removeprefix(prefix).rpartition(".")
            return name, state
    return "", ""


def _place(groups: list[list[list[str]]], name: str) -> list[tuple[int, int]]:
    return [(i, k) for i, optimizer in enumerate(groups) for k, names in enumerate(optimizer) if name in names]


def _as_json(key: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [_as_json(key, v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"hyperparameter {key!r} of the optimizer is a {type(value).__name__}, which cannot be saved")


def _like(present: Any, saved: Any) -> Any:
    if isinstance(present, Tensor):
        return torch.full_like(present, saved)
    return tuple(saved) if isinstance(present, tuple) else saved
