"""A model's arguments and results as flat tensors, which is all that a C++ host has."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


@dataclass(frozen=True)
class Argument:
    """A tensor, or a KeyedJaggedTensor (KJT) that is handed over as values, offsets and perhaps weights.

    Attributes:
        name (str): the parameter of the model's forward.
        features (Optional[tuple[str, ...]]): the KJT's keys in the order in which their ids lie in ``values``; None: a
            tensor.
        weighted (bool): whether the KJT carries per-sample weights.
    """

    name: str
    features: tuple[str, ...] | None = None
    weighted: bool = False

    def input_names(self) -> list[str]:
        """``name``, or ``name.values``, ``name.offsets`` and ``name.weights``."""
        if self.features is None:
            return [self.name]
        return [f"{self.name}.{part}" for part in ("values", "offsets", *(("weights",) if self.weighted else ()))]


def arguments_of(model: nn.Module, example: Sequence[Any]) -> list[Argument]:
    """What the model's forward is called with.

    Of a KJT the features are those that the model's embedding collections read, in the order of the tables, once for
    each table: then no lookup has to permute ids, which TorchRec's ``permute`` cannot do in an exported program.

    Args:
        model (nn.Module): whose forward takes ``example``.
        example (Sequence[Union[Tensor, KeyedJaggedTensor]]): positional arguments.

    Raises:
        TypeError: if an argument is neither a tensor nor a KeyedJaggedTensor.
        ValueError: if a KeyedJaggedTensor has a variable batch per feature.
    """
    read = [
        tuple(feature for config in module.embedding_bag_configs() for feature in config.feature_names)
        for module in model.modules()
        if isinstance(module, EmbeddingBagCollectionInterface)
    ]
    arguments: list[Argument] = []
    for name, value in zip(_parameter_names(model, len(example)), example, strict=True):
        if isinstance(value, KeyedJaggedTensor):
            if value.variable_stride_per_key() or value.inverse_indices_or_none() is not None:
                raise ValueError(f"{name}: features that vary in batch size cannot be exported")
            keys = value.keys()
            of_this = {features for features in read if set(features) <= set(keys)}
            features = of_this.pop() if len(of_this) == 1 else tuple(keys)
            arguments.append(Argument(name, features, value.weights_or_none() is not None))
        elif isinstance(value, Tensor):
            arguments.append(Argument(name))
        else:
            raise TypeError(f"{name} must be a tensor or a KeyedJaggedTensor, got {type(value).__name__}")
    return arguments


def _parameter_names(model: nn.Module, count: int) -> list[str]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in positional]
    return [names[k] if k < len(names) else f"input{k}" for k in range(count)]


def flatten(arguments: Sequence[Argument], values: Sequence[Any]) -> tuple[Tensor, ...]:
    """The tensors of arguments, the features of each KJT in the order of its Argument.

    Raises:
        KeyError: naming the argument, if a KJT lacks a feature.
        ValueError: naming the argument, if it comes without weights.
    """
    tensors: list[Tensor] = []
    for argument, value in zip(arguments, values, strict=True):
        if argument.features is None:
            tensors.append(value)
            continue
        keys = value.keys()
        if keys != list(argument.features):
            missing = [f for f in argument.features if f not in keys]
            if missing:
                raise KeyError(f"{argument.name} lacks the features {', '.join(missing)}, it has {keys}")
            value = value.permute([keys.index(f) for f in argument.features])
        tensors += [value.values(), value.offsets()]
        if argument.weighted:
            if value.weights_or_none() is None:
                raise ValueError(f"{argument.name} must carry per-sample weights")
            tensors.append(value.weights())
    return tuple(tensors)


def unflatten(arguments: Sequence[Argument], tensors: Sequence[Tensor]) -> list[Any]:
    """The arguments again."""
    values: list[Any] = []
    rest = iter(tensors)
    for argument in arguments:
        if argument.features is None:
            values.append(next(rest))
            continue
        ids, offsets = next(rest), next(rest)
        weights = next(rest) if argument.weighted else None
        values.append(KeyedJaggedTensor(list(argument.features), ids, weights, offsets=offsets))
    return values


def batch_size(arguments: Sequence[Argument], values: Sequence[Any]) -> int:
    """The batch size that all KJTs share.

    Raises:
        ValueError: if there is no KJT, or they differ.
    """
    sizes = {a.name: int(v.stride()) for a, v in zip(arguments, values, strict=True) if a.features is not None}
    if not sizes:
        raise ValueError("the example holds no KeyedJaggedTensor: there is nothing to look up")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the example's batch sizes differ: {sizes}")
    return next(iter(sizes.values()))


def symbolic_shapes(arguments: Sequence[Argument], tensors: Sequence[Tensor], batch: int) -> list[list[str]]:
    """The shape of each flat tensor: numbers, "batch", "ids" of a KJT, or features * batch + 1.

    A tensor is taken as batched if its first dimension is the example's batch size.
    """
    names = [(argument, name) for argument in arguments for name in argument.input_names()]
    shapes: list[list[str]] = []
    for (argument, name), tensor in zip(names, tensors, strict=True):
        shape = [str(size) for size in tensor.shape]
        if argument.features is None:
            if tensor.dim() and tensor.shape[0] == batch:
                shape[0] = "batch"
        elif name.endswith(".offsets"):
            shape = [f"{len(argument.features)}*batch+1"]
        else:
            shape = [f"{argument.name}.ids"]
        shapes.append(shape)
    return shapes


def dynamic_shapes(arguments: Sequence[Argument], shapes: Sequence[Sequence[str]]) -> tuple[dict[int, Any], ...]:
    """:func:`symbolic_shapes` as torch.export takes them: any batch and any number of ids, 0 included."""
    batch = torch.export.Dim("batch", min=0)
    ids = {f"{a.name}.ids": torch.export.Dim(f"ids_{a.name}", min=0) for a in arguments if a.features is not None}
    dims: list[dict[int, Any]] = []
    for shape in shapes:
        first = shape[0] if shape else ""
        if first == "batch":
            dims.append({0: batch})
        elif first in ids:
            dims.append({0: ids[first]})
        elif "*batch" in first:
            features = int(first.split("*")[0])
            dims.append({0: (features * batch if features > 1 else batch) + 1})
        else:
            dims.append({})
    return tuple(dims)


def named_outputs(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor | KeyedTensor]]:
    """What a model returns as a sequence: a KeyedTensor, a tensor, or lists, tuples and dicts of them.

    Raises:
        TypeError: if it returns anything else.
    """
    if isinstance(output, Tensor | KeyedTensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_outputs(value, f"{name}.{key}")
    elif isinstance(output, list | tuple):
        for k, value in enumerate(output):
            yield from named_outputs(value, f"{name}.{k}")
    else:
        raise TypeError(f"the model returns a {type(output).__name__}, which is no tensor")


class FlatModel(nn.Module):
    """A model whose forward takes and returns flat tensors."""

    def __init__(self, model: nn.Module, arguments: Sequence[Argument]) -> None:
        super().__init__()
        self.model = model
        self._arguments = list(arguments)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The model's outputs as a tuple, a KeyedTensor as its values."""
        output = self.model(*unflatten(self._arguments, tensors))
        return tuple(t.values() if isinstance(t, KeyedTensor) else t for _, t in named_outputs(output))
