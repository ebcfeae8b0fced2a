"""What torch does to tensors under names that it does not document."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def changes_in_place(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for inference tensors, which do not tell."""
    return 0 if tensor.is_inference() else tensor._version


def add_each_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Add to each tensor one of the others, in one launch where that is possible."""
    torch._foreach_add_(list(tensors), list(others))


def assert_on_device(condition: Tensor, message: str) -> None:
    """RuntimeError if a bool [] is False, without waiting for the device; torch.export keeps it in the program."""
    torch._assert_async(condition, message)


def map_nested(change: Callable[[Any], Any], nested: Any, is_leaf: Callable[[Any], bool]) -> Any:
    """Nested tuples, lists and dictionaries of the same form, with every leaf changed."""
    return tree_map(change, nested, is_leaf=is_leaf)
