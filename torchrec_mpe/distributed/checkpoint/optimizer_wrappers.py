"""The optimizers within what a user trains with, and what wrappers around them keep of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper

from torchrec_mpe.distributed.checkpoint.tensor_names import without_prefix
from torchrec_mpe.upstream.checkpoint import SavedTensor
from torchrec_mpe.upstream.optimizers import optimizer_inside

STATE = "wrapper."


@dataclass(frozen=True)
class OptimizerParts:
    """What an optimizer is made of, but for the fused one, which is saved as its tables are.

    Attributes:
        dense (list[torch.optim.Optimizer]): torch's, in order.
        wrappers (list[OptimizerWrapper]): around them or the fused one, each before what it wraps.
    """

    dense: list[torch.optim.Optimizer]
    wrappers: list[OptimizerWrapper]


def optimizer_parts(optimizer: torch.optim.Optimizer | None, fused: KeyedOptimizer | None) -> OptimizerParts:
    """Take apart what TorchRec's keyed optimizers combine and wrap.

    Args:
        optimizer (Optional[torch.optim.Optimizer]): torch's, or TorchRec's of such.
        fused (Optional[KeyedOptimizer]): the model's.

    Raises:
        TypeError: for a KeyedOptimizer that may keep a state elsewhere than TorchRec's combinations and wrappers do.
    """
    if optimizer is None or optimizer is fused:
        return OptimizerParts([], [])
    if isinstance(optimizer, CombinedOptimizer):
        parts = [optimizer_parts(part, fused) for _, part in optimizer.optimizers]
        return OptimizerParts([o for p in parts for o in p.dense], [w for p in parts for w in p.wrappers])
    if type(optimizer) is KeyedOptimizerWrapper:
        return optimizer_parts(optimizer_inside(optimizer), fused)
    if isinstance(optimizer, OptimizerWrapper) and type(optimizer).state_dict is OptimizerWrapper.state_dict:
        inner = optimizer_parts(optimizer_inside(optimizer), fused)
        return OptimizerParts(inner.dense, [optimizer, *inner.wrappers])
    if isinstance(optimizer, KeyedOptimizer):
        raise TypeError(
            f"{type(optimizer).__name__} has a state that no checkpoint holds: combine and wrap optimizers with "
            "TorchRec's CombinedOptimizer, KeyedOptimizerWrapper and subclasses of OptimizerWrapper that keep their "
            "state by a parameter of their own, as WarmupOptimizer does"
        )
    return OptimizerParts([optimizer], [])


class WrapperStates:
    """The state of optimizer wrappers by parameters that no optimizer updates, such as WarmupOptimizer's iteration.

    Args:
        wrappers (Sequence[OptimizerWrapper]): of :func:`optimizer_parts`.

    Raises:
        TypeError: if there is a state that is not all tensors.
    """

    def __init__(self, wrappers: Sequence[OptimizerWrapper]) -> None:
        self._wrappers = wrappers
        self._own: dict[str, tuple[OptimizerWrapper, Tensor]] = {}
        updated = {id(p) for wrapper in wrappers for group in wrapper.param_groups for p in group["params"]}
        for number, wrapper in enumerate(wrappers):
            for name, parameter in wrapper.params.items():
                # Of wrappers in wrappers the outer one comes first; what is inside may show the same parameter.
                if id(parameter) not in updated:
                    updated.add(id(parameter))
                    self._own[f"{number}.{name}"] = wrapper, parameter
        for key, value in self.tensors().items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{key.removeprefix(STATE)} of an optimizer wrapper is a {type(value).__name__}")

    def names(self) -> list[str]:
        """Number of the wrapper and name of its parameter, for the manifest."""
        return list(self._own)

    def tensors(self) -> dict[str, Tensor]:
        """The state to save, by name."""
        return {
            f"{STATE}{name}.{key}": value
            for name, (wrapper, parameter) in self._own.items()
            for key, value in wrapper.state.get(parameter, {}).items()
        }

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Compare with the wrappers of a checkpoint.

        Raises:
            ValueError: if one of them has a state here and not there, or there and not here.
        """
        saved = manifest.get("optimizer_wrappers", [])
        if sorted(saved) != sorted(self._own):
            here = ", ".join(f"{type(w).__name__} ({name})" for name, (w, _) in self._own.items()) or "none"
            raise ValueError(
                f"optimizer wrappers with a state: {here} here, {', '.join(saved) or 'none'} in the checkpoint; give "
                "an optimizer that is wrapped as the saved one"
            )

    def targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor]:
        """Empty tensors for what a checkpoint has of them."""
        self._loaded = {
            key: torch.empty(entry.size, dtype=entry.dtype) for key, entry in saved.items() if key.startswith(STATE)
        }
        return self._loaded

    def set(self) -> None:
        """Give wrappers the state that was loaded into :meth:`targets`; without one they begin anew."""
        for name, (wrapper, parameter) in self._own.items():
            of_parameter = without_prefix(f"{STATE}{name}.", self._loaded)
            states: Any = wrapper.state
            states.pop(parameter, None)
            if of_parameter:
                states[parameter] = of_parameter
