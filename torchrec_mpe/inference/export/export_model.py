"""A whole model with packed embeddings as one file for serving hosts, with or without Python."""

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_mpe.files.atomic import atomic_file, hidden_folder
from torchrec_mpe.inference.export.export_arguments import (
    Argument,
    FlatModel,
    arguments_of,
    batch_size,
    dynamic_shapes,
    flatten,
    named_outputs,
    symbolic_shapes,
)
from torchrec_mpe.inference.export.export_weights import write_weights
from torchrec_mpe.inference.export.exported_model import METADATA_FILE, load_exported
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.ops import library
from torchrec_mpe.upstream.export import (
    CannotTraceError,
    compile_package,
    for_any_batch,
    operator_namespaces,
    trace,
    with_state,
)
from torchrec_mpe.upstream.versions import __version__

_FORMS = ("aoti", "program")
_BACKENDS = ("packed", "fbgemm")
_WEIGHTS = ("inside", "beside")


@torch.no_grad()
def export(
    model: nn.Module,
    example: Sequence[Tensor | KeyedJaggedTensor] | Tensor | KeyedJaggedTensor,
    path: str | os.PathLike[str],
    *,
    form: str = "aoti",
    backend: str = "packed",
    weights: str = "inside",
) -> None:
    """Write a model with packed embeddings as one file that a serving host loads, checked against the model.

    The exported model takes flat tensors, in the order of the arguments: a tensor as it is; a KeyedJaggedTensor (KJT)
    as ``values`` [N], ``offsets`` [F * B + 1] and, if the example's has them, ``weights`` [N], feature by feature, bag
    by bag. The features are those that the collection reads, in the order of the tables, a feature of two tables twice.
    It returns flat tensors, a KeyedTensor as its values. The batch B and the number of ids N are dynamic, 0 and 1
    included; ids and offsets have the dtypes of the example, int32 or int64. What must be handed over is told in the
    file's metadata, see :class:`torchrec_mpe.inference.export.exported_model.ExportedModel`, which also takes KJTs.

    Forms:

    - "aoti": compiled by AOTInductor for the model's device and this machine's CPU instruction set, for C++ and Python:
      ``torch::inductor::AOTIModelPackageLoader``, ``torch._inductor.aoti_load_package``. Takes a C++ compiler.
    - "program": a torch.export program, ``torch.export.load``, for Python hosts and for further compilers.

    Backends:

    - "packed": rows at exactly their bits. The host loads this library's operators first, in C++ by ``dlopen`` of
      ``torchrec_mpe/ops/libtorchrec_mpe.so``. On CUDA the operator is a Triton kernel that Python launches: a C++
      host needs "fbgemm" there.
    - "fbgemm": FBGEMM's and PyTorch's operators alone, see FbgemmTableBatchedEmbeddingBags: larger, equal but for the
      rounding of the step sizes to float16. The host loads FBGEMM's operators and nothing of this package.

    Ids that are no rows are treated as the collections' ``bounds_check_mode`` says, with a RuntimeError in mode FATAL.

    Args:
        model (nn.Module): in eval mode, holds, or is, PackedEmbeddingBagCollections.
        example (Sequence[Union[Tensor, KeyedJaggedTensor]]): arguments of the model, of 2 examples or more, on its
            device. A tensor whose first dimension is the batch size is taken as batched.
        path (PathLike): a file that ends in ".pt2"; replaced if it exists.
        form (str): "aoti" or "program".
        backend (str): "packed" or "fbgemm".
        weights (str): "inside" the file, of which each process makes a copy in its memory; or "beside" it, in a file
            ``<stem>-<digest>.weights`` that processes on the CPU map and share. A host maps it before the first run, as
            :func:`torchrec_mpe.load_exported` and examples/serve_cpp do; without, libtorch
            crashes. An earlier export's weights are left where they are.

    Raises:
        RuntimeError: if the exported model does not return what the model does; nothing is written.
        TypeError: if the model takes or returns something other than tensors, KJTs and KeyedTensors.
        ValueError: if the model is in training mode or holds no packed collection; naming it, if a collection has the
            other backend; if the example has fewer than 2 examples or a variable batch; if torch.export cannot trace
            the model for any batch, as when collections read other features of one KJT; or an option is unknown.

    Example::

        >>> export(model, (dense, sparse), "model.pt2")
        >>> load_exported("model.pt2")(dense, sparse)
    """
    target = Path(path)
    _check_options(target, form=(form, _FORMS), backend=(backend, _BACKENDS), weights=(weights, _WEIGHTS))
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: call eval() first")
    served = _on_backend(model, backend)
    values = [example] if isinstance(example, Tensor | KeyedJaggedTensor) else list(example)
    arguments = arguments_of(served, values)
    batch = batch_size(arguments, values)
    if batch < 2:
        raise ValueError(
            f"the example must hold 2 examples or more, to tell the batch from other dimensions; it holds {batch}"
        )
    inputs = flatten(arguments, values)
    shapes = symbolic_shapes(arguments, inputs, batch)
    flat = FlatModel(served, arguments).eval()
    with for_any_batch(), hidden_folder(target) as folder:
        program = _trace(flat, inputs, dynamic_shapes(arguments, shapes))
        metadata = _metadata(program, arguments, inputs, shapes, served(*values), backend)
        staged = folder / target.name
        if weights == "beside":
            metadata |= write_weights(staged, _constants(program))
        if form == "aoti":
            compile_package(program, staged, metadata, constants_inside="weights_file" not in metadata)
        else:
            _write_program(program, staged, metadata)
        _check(staged, flat, inputs, shapes)
        # The package comes last: whoever sees it finds its weights.
        for file in sorted(staged.parent.iterdir(), key=lambda file: file == staged):
            with atomic_file(target.with_name(file.name)) as temporary:
                os.replace(file, temporary)


def _check_options(path: Path, **options: tuple[str, tuple[str, ...]]) -> None:
    if path.suffix != ".pt2":
        raise ValueError(f"an exported model's file must end in .pt2, got {path}")
    for option, (value, choices) in options.items():
        if value not in choices:
            raise ValueError(f"{option} must be {' or '.join(choices)}, got {value}")


def _on_backend(model: nn.Module, backend: str) -> nn.Module:
    """The model, or a copy of it with its collections on FBGEMM."""
    collections = {n: m for n, m in model.named_modules() if isinstance(m, PackedEmbeddingBagCollection)}
    if not collections:
        raise ValueError(
            f"{type(model).__name__} holds no PackedEmbeddingBagCollection: emit_inference_model makes them"
        )
    if backend == "packed":
        for name, collection in collections.items():
            if collection.backend() != backend:
                raise ValueError(f"collection {name or type(model).__name__} stores FBGEMM's rows, not packed ones")
        if not library.is_loaded():
            raise RuntimeError(f"the packed backend exports the compiled operators: {library.problem()}")
        return model
    # deepcopy finds the collections on FBGEMM in its memo and copies nothing of the packed ones.
    memo: dict[int, Any] = {id(c): c if c.backend() == "fbgemm" else c.on_fbgemm() for c in collections.values()}
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied


def _trace(flat: FlatModel, inputs: tuple[Tensor, ...], shapes: tuple[dict[int, Any], ...]) -> ExportedProgram:
    try:
        return trace(flat, inputs, (shapes,))
    except CannotTraceError as error:
        raise ValueError(
            f"torch.export cannot trace {type(flat.model).__name__} for every batch and number of ids; collections "
            f"that share a KeyedJaggedTensor must read the same features in the same order. It says: {error}"
        ) from error


def _metadata(
    program: ExportedProgram,
    arguments: Sequence[Argument],
    inputs: Sequence[Tensor],
    shapes: Sequence[Sequence[str]],
    output: Any,
    backend: str,
) -> dict[str, str]:
    """What a host has to know, as lines of text that C++ can read without a parser."""
    names = [name for argument in arguments for name in argument.input_names()]
    outputs = dict(named_outputs(output))
    metadata = {
        "torchrec_mpe": __version__,
        "backend": backend,
        "device": inputs[0].device.type,
        "libraries": "\n".join(_libraries(program)),
        "inputs": "\n".join(
            f"{name} {_dtype(tensor)} {','.join(shape) or '-'}"
            for name, tensor, shape in zip(names, inputs, shapes, strict=True)
        ),
        "outputs": "\n".join(
            f"{name} {_dtype(t.values() if isinstance(t, KeyedTensor) else t)}" for name, t in outputs.items()
        ),
    }
    for argument in arguments:
        if argument.features is not None:
            metadata[f"features.{argument.name}"] = "\n".join(argument.features)
    for name, tensor in outputs.items():
        if isinstance(tensor, KeyedTensor):
            columns = zip(tensor.length_per_key(), tensor.keys(), strict=True)
            metadata[f"columns.{name}"] = "\n".join(f"{length} {key}" for length, key in columns)
    return metadata


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _libraries(program: ExportedProgram) -> list[str]:
    """Namespaces of the operators that are not PyTorch's own."""
    return sorted(operator_namespaces(program) - {"aten", "prim", "prims", "higher_order"})


def _constants(program: ExportedProgram) -> dict[str, Tensor]:
    """Parameters, buffers and tensor constants by name."""
    tensors = {name: t for name, t in program.constants.items() if isinstance(t, Tensor)}
    return {**program.state_dict, **tensors}


def _write_program(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    if "weights_file" in metadata:
        # A host that forgets to map the weights gets an error, not values.
        program = with_state(program, _on_meta)
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata, indent=2)})


def _on_meta(tensor: Tensor) -> Tensor:
    meta = tensor.to("meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta


def _check(path: Path, flat: FlatModel, example: Sequence[Tensor], shapes: Sequence[Sequence[str]]) -> None:
    """Run what was written on the example and on an empty batch, and compare."""
    empty: list[Tensor] = []
    for tensor, shape in zip(example, shapes, strict=True):
        if not shape or shape[0].isdigit():
            empty.append(tensor)
        else:
            empty.append(torch.zeros_like(tensor[:1]) if shape[0].endswith("*batch+1") else tensor[:0])
    exported = load_exported(path)
    for inputs in (example, empty):
        for want, got in zip(flat(*inputs), exported.run(*inputs), strict=True):
            try:
                torch.testing.assert_close(got, want, equal_nan=True)
            except AssertionError as error:
                raise RuntimeError(f"the exported model differs from {type(flat.model).__name__}: {error}") from None
