"""What torch's Module leaves to subclasses without documenting it."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules.batchnorm import _BatchNorm

Self = TypeVar("Self", bound="ConvertsItself")


class ConvertsItself(nn.Module):
    """A module that decides what ``.to()``, ``.cuda()``, ``.half()`` and their like do to its tensors."""

    def convert(self, convert: Callable[[Tensor], Tensor], recurse: bool) -> None:
        """Replace each tensor by what ``convert`` makes of it; subclasses do it in another way.

        Args:
            convert (Callable[[Tensor], Tensor]): moves a tensor or changes its dtype.
            recurse (bool): into submodules.
        """
        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.convert(fn, recurse)
        return self


class ChecksItsState(nn.Module):
    """A module that may refuse a state dict. The refusal is among the errors that ``load_state_dict`` raises."""

    def refusal(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Why a state cannot be loaded, or None; if it cannot, nothing of it is.

        Args:
            state_dict (Mapping[str, Any]): of the whole model.
            prefix (str): of this module's keys.
        """
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *args: Any
    ) -> None:
        refused = self.refusal(state_dict, prefix)
        if refused is not None:
            errors: list[str] = args[-1]
            errors.append(refused)
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """A module's own buffers by name, to be read and replaced without the checks of ``register_buffer``."""
    return module._buffers


def replace_buffers(module: nn.Module, buffers: Mapping[str, Any]) -> None:
    """Give a module, such as a shallow copy of another, its own dictionary of buffers."""
    module._buffers = dict(buffers)


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Running mean and variance of a batch normalization that keeps them; of other modules none."""
    if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
        return [module.running_mean, module.running_var]
    return []


def is_root_of_trace(memo: Any) -> bool:
    """Whether ``named_modules`` is called on the module that torch.fx traces, whose class's ``forward`` it takes.

    Args:
        memo (Optional[set]): of that call; of a submodule it is not None.
    """
    return memo is None and bool(is_fx_symbolic_tracing())


def is_traced(value: Any) -> bool:
    """Whether a value stands for one that torch.fx will know later."""
    return isinstance(value, Proxy)
