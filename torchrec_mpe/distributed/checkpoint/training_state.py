"""All state of a training run as named tensors and JSON values, and the way back."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_mpe.distributed.checkpoint.cached_tables import (
    cache_progress,
    cache_progress_targets,
    check_cached_tables,
    clear_cached_optimizer_state,
    set_cache_progress,
)
from torchrec_mpe.distributed.checkpoint.checkpoint import Checkpoint, search_config_to_json
from torchrec_mpe.distributed.checkpoint.dense_optimizer import DenseOptimizers
from torchrec_mpe.distributed.checkpoint.fused_optimizer import (
    clear_fused_state,
    describe_tables,
    fused_hyperparameters,
    fused_numbers,
    fused_state,
    global_size,
    immovable,
    refusal,
    set_fused_hyperparameters,
    set_fused_numbers,
)
from torchrec_mpe.distributed.checkpoint.optimizer_wrappers import WrapperStates, optimizer_parts
from torchrec_mpe.distributed.checkpoint.preparation import phase_of, search_config_of
from torchrec_mpe.distributed.checkpoint.rng import derive_rng_state, rng_state, set_rng_state
from torchrec_mpe.distributed.checkpoint.tensor_names import prefixed, without_prefix
from torchrec_mpe.upstream.checkpoint import SavedTensor
from torchrec_mpe.upstream.sharded_tensor import ShardedTensor

OptimizerStateChoice = bool | Literal["where possible"]

_MODEL, _BUFFERS, _FUSED, _FUSED_NUMBERS, _RNG = "model.", "buffers.", "fused.", "fused_numbers.", "rng."
_FUSED_HYPERPARAMETERS, _CACHES = "fused_hyperparameters.", "caches."


class TrainingState:
    """The state of a model and its optimizers; the tensors are those in use, not copies.

    Args:
        model (nn.Module): a DistributedModelParallel; to load only, an unsharded model as well.
        optimizer (Optional[torch.optim.Optimizer]): of all but the rows in fused TBEs.

    Raises:
        ValueError: if collections are in different phases or have different search settings, or the optimizer has a
            parameter that is not the model's.
        TypeError: if the model's state is not all tensors.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self._model = model
        self._sharded = model if isinstance(model, DistributedModelParallel) else None
        self.phase = phase_of(model)
        self.search_config = search_config_of(model)
        self._state_dict: dict[str, Tensor] = dict(model.state_dict())
        for name, value in self._state_dict.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"the model's state {name} is a {type(value).__name__}: only tensors can be saved")
        fused = None if self._sharded is None else self._sharded.fused_optimizer
        parts = optimizer_parts(optimizer, fused)
        self._tables = {} if self._sharded is None else describe_tables(self._sharded, self._state_dict)
        self._dense = DenseOptimizers(
            parts.dense, dict(model.named_parameters()), self._state_dict, self._tables.keys()
        )
        self._has_dense = bool(parts.dense)
        self._wrappers = WrapperStates(parts.wrappers)
        self._fused = {} if self._sharded is None else fused_state(self._sharded)
        self._numbers = {} if self._sharded is None else fused_numbers(self._sharded)
        buffers = {name for name, _ in model.named_buffers()}
        sharded = ShardedTensor | DTensor
        self._buffers = [n for n, t in self._state_dict.items() if n in buffers and not isinstance(t, sharded)]
        self._device = next(model.parameters()).device if self._sharded is None else self._sharded.device

    def buffer_digests(self) -> dict[str, str]:
        """A digest of each replicated buffer, which finds those that differ between ranks.

        TorchRec does not broadcast buffers: running statistics of batch normalization are each rank's own.
        """
        cpu = {name: self._state_dict[name].detach().cpu().contiguous() for name in self._buffers}
        return {
            name: hashlib.sha256(t.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in cpu.items()
        }

    def tensors(self, rank: int, local_buffers: Collection[str]) -> dict[str, Tensor]:
        """What this rank saves, by name; what the ranks share has the same name on each."""
        return {
            **self._of_model(rank, local_buffers),
            **prefixed(_FUSED, self._fused),
            **prefixed(_FUSED_NUMBERS, self._numbers),
            **prefixed(_FUSED_HYPERPARAMETERS, self._hyperparameters()),
            **prefixed(_CACHES, cache_progress(self._model)),
            **self._dense.tensors(),
            **self._wrappers.tensors(),
            **prefixed(f"{_RNG}{rank}.", rng_state(self._device)),
        }

    def values(self) -> dict[str, Any]:
        """JSON values for the manifest, the same on every rank."""
        return {
            "phase": self.phase.value,
            "search_config": search_config_to_json(self.search_config),
            "layout_digests": self.layout_digests(),
            "optimizers": self._dense.hyperparameters(),
            "optimizer_wrappers": self._wrappers.names(),
        }

    def local_tables(self) -> dict[str, dict[str, Any]]:
        """The tables' shardings, and the fused optimizers of those that have a shard on this rank."""
        return self._tables

    def check_loadable(
        self, checkpoint: Checkpoint, saved: Mapping[str, SavedTensor], tables: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Find out before anything is loaded whether a checkpoint is of a model like this one.

        Args:
            checkpoint (Checkpoint): to load.
            saved (Mapping[str, SavedTensor]): its tensors.
            tables (Mapping[str, Mapping[str, Any]]): of all ranks' :meth:`local_tables`.

        Raises:
            ValueError: if phase, preparation, tensors or their shapes, or the optimizer's parameter groups differ.
        """
        if checkpoint.phase is not self.phase:
            raise ValueError(
                f"the checkpoint is of the {checkpoint.phase.value} phase, the model is in the {self.phase.value} "
                "phase: call checkpoint.prepare_(model) before sharding it"
            )
        saved_digests = checkpoint.manifest["layout_digests"]
        for name, digest in self.layout_digests().items():
            if saved_digests.get(name, digest) != digest:
                raise ValueError(
                    f"{name.removesuffix('.layout_digest')} was prepared with other counts, groups or bit-widths than "
                    "the checkpoint: call checkpoint.prepare_(model) before sharding it"
                )
        check_cached_tables(checkpoint.manifest["tables"], tables)
        here = self._of_model(0, checkpoint.manifest["local_buffers"])
        _refuse(sorted(here.keys() - saved.keys()), f"the model has, and the checkpoint {checkpoint.path} has not")
        unknown = {key for key in saved if key.startswith((_MODEL, f"{_BUFFERS}0."))} - here.keys()
        _refuse(sorted(unknown), f"the checkpoint {checkpoint.path} has, and the model has not")
        for key, tensor in here.items():
            if global_size(tensor) != saved[key].size:
                raise ValueError(f"{key} has shape {global_size(tensor)}, in the checkpoint it is {saved[key].size}")
        if self._has_dense:
            self._dense.check(checkpoint.manifest["optimizers"])
        if self._has_dense or self._wrappers.names():
            self._wrappers.check(checkpoint.manifest)

    def without_state(
        self, checkpoint: Checkpoint, tables: Mapping[str, Mapping[str, Any]], wanted: OptimizerStateChoice
    ) -> set[str]:
        """The parameters whose fused optimizer starts anew.

        Raises:
            ValueError: if there are such and ``wanted`` is True.
        """
        if wanted is False:
            return set(tables)
        reasons = immovable(checkpoint.manifest["tables"], tables)
        if self._sharded is None:
            states = {name: t for name, t in checkpoint.manifest["tables"].items() if t["state"]}
            reasons = dict.fromkeys(states, "the model here is not sharded")
        if reasons and wanted is True:
            raise ValueError(refusal(reasons))
        return set(reasons)

    def targets(
        self,
        checkpoint: Checkpoint,
        saved: Mapping[str, SavedTensor],
        fresh: set[str],
        rank: int,
        world_size: int,
    ) -> dict[str, Tensor]:
        """The tensors to load into: those in use, and new ones for the rest."""
        moved = {name: t for name, t in self._fused.items() if not _of(name, fresh)}
        numbers = {name: t for name, t in self._numbers.items() if f"{_FUSED_NUMBERS}{name}" in saved}
        # Under another world size what each rank had of its own is rank 0's for all.
        of_rank = rank if world_size == checkpoint.world_size else 0
        prefix = f"{_RNG}{of_rank}."
        return {
            **self._of_model(of_rank, checkpoint.manifest["local_buffers"]),
            **prefixed(_FUSED, moved),
            **prefixed(_FUSED_NUMBERS, numbers),
            **cache_progress_targets(self._model, saved, _CACHES),
            **self._dense.targets(saved),
            **self._wrappers.targets(saved),
            **{
                key: torch.empty(entry.size, dtype=entry.dtype)
                for key, entry in saved.items()
                if key.startswith(_FUSED_HYPERPARAMETERS)
                and key.removeprefix(_FUSED_HYPERPARAMETERS).rpartition(".")[0] in self._numbers
            },
            **{
                key: torch.empty(entry.size, dtype=entry.dtype)
                for key, entry in saved.items()
                if key.startswith(prefix)
            },
        }

    def set(
        self, targets: Mapping[str, Tensor], checkpoint: Checkpoint, fresh: set[str], rank: int, world_size: int
    ) -> None:
        """Put to use what was loaded into :meth:`targets`."""
        # Rows and quantizers are in place: this lets modules drop what they had cached of them.
        self._model.load_state_dict(dict(self._state_dict))
        clear_cached_optimizer_state(self._model, fresh)
        set_cache_progress(self._model, without_prefix(_CACHES, targets))
        if self._sharded is not None:
            clear_fused_state({name: t for name, t in self._fused.items() if _of(name, fresh)})
            set_fused_numbers(self._sharded, self._numbers, fresh)
            set_fused_hyperparameters(self._sharded, without_prefix(_FUSED_HYPERPARAMETERS, targets))
        if self._has_dense:
            self._dense.set(checkpoint.manifest["optimizers"])
        self._wrappers.set()
        generators = {key.split(".")[2]: t for key, t in targets.items() if key.startswith(_RNG)}
        if world_size == checkpoint.world_size:
            set_rng_state(generators, self._device)
        else:
            derive_rng_state(generators["torch"], checkpoint.world_size, rank, world_size)

    def _hyperparameters(self) -> dict[str, Tensor]:
        return {} if self._sharded is None else fused_hyperparameters(self._sharded)

    def _of_model(self, rank: int, local_buffers: Collection[str]) -> dict[str, Tensor]:
        return {
            f"{_BUFFERS}{rank}.{name}" if name in local_buffers else f"{_MODEL}{name}": tensor
            for name, tensor in self._state_dict.items()
        }

    def layout_digests(self) -> dict[str, int]:
        """What counts or plan the quantizers were prepared with, by name."""
        return {name: int(t) for name, t in self._state_dict.items() if name.endswith(".layout_digest")}


def differing(digests: Sequence[Mapping[str, str]]) -> list[str]:
    """The names of :meth:`TrainingState.buffer_digests` whose digests are not the same on all ranks."""
    return sorted(name for name in digests[0] if len({of_rank.get(name) for of_rank in digests}) > 1)


def _refuse(names: list[str], said: str) -> None:
    if names:
        raise ValueError(f"{said}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}")


def _of(state: str, parameters: set[str]) -> bool:
    """Whether a name of fused state, ``<parameter>.<table>.<state>``, is of one of some parameters."""
    return any(state.startswith(f"{parameter}.") for parameter in parameters)
