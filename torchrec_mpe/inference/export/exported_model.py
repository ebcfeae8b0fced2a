"""Exported models in a Python host."""

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fbgemm_gpu  # noqa: F401  (its operators)
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe.ops.packed_embedding_bag  # noqa: F401  (its operators)
from torchrec_mpe.inference.export.export_arguments import Argument, flatten
from torchrec_mpe.inference.export.export_weights import map_weights
from torchrec_mpe.upstream.export import load_package

METADATA_FILE = "torchrec_mpe.json"


class ExportedModel:
    """A loaded model: called with the arguments that it was exported with, or with their flat tensors.

    Attributes:
        metadata (Mapping[str, str]): text, one line an item:

            - ``inputs``: name, dtype and shape of each flat tensor, in order.
            - ``features.<argument>``: the features of a KeyedJaggedTensor, in order.
            - ``outputs``: name and dtype of each flat output.
            - ``columns.<output>``: number of columns and key of a KeyedTensor's embeddings, in order.
            - ``libraries``: the namespaces of operators that a host must load, of torchrec_mpe and fbgemm.
            - ``weights...``: where the weights lie, see :func:`.export_weights.write_weights`.

            and ``device``, ``backend`` and the version of ``torchrec_mpe``. AOTInductor's own entries are there too.
    """

    def __init__(self, run: Callable[..., Any], metadata: Mapping[str, str]) -> None:
        self.metadata = metadata
        self._run = run
        self._inputs = [tuple(line.split(" ")) for line in metadata["inputs"].splitlines()]
        names = [name for name, _, _ in self._inputs]
        self._arguments: list[Argument] = []
        for name in names:
            argument = name.rpartition(".")[0]
            if f"features.{argument}" not in metadata:
                self._arguments.append(Argument(name))
            elif name.endswith(".values"):
                features = tuple(metadata[f"features.{argument}"].splitlines())
                self._arguments.append(Argument(argument, features, f"{argument}.weights" in names))

    def __call__(self, *arguments: Tensor | KeyedJaggedTensor) -> Tensor | tuple[Tensor, ...]:
        """Run the model.

        Args:
            arguments (Union[Tensor, KeyedJaggedTensor]): as at the export, or the flat tensors. Features of a
                KeyedJaggedTensor may come in any order.

        Returns:
            Union[Tensor, tuple[Tensor, ...]]: the output, or a tuple of several.

        Raises:
            KeyError: if a feature is missing.
            RuntimeError: in mode FATAL, if an id is not a row of its table.
            TypeError: naming the input, if its dtype or number of dimensions is not that of the export.
            ValueError: if there are more or fewer arguments, or weights are missing.
        """
        if any(isinstance(a, KeyedJaggedTensor) for a in arguments):
            if len(arguments) != len(self._arguments):
                raise ValueError(
                    f"{len(arguments)} arguments were given, {[a.name for a in self._arguments]} are asked"
                )
            tensors = flatten(self._arguments, arguments)
        else:
            tensors = tuple(a for a in arguments if isinstance(a, Tensor))
        outputs = self.run(*tensors)
        return outputs[0] if len(outputs) == 1 else outputs

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model on flat tensors; raises as a call does."""
        if len(tensors) != len(self._inputs):
            raise ValueError(
                f"{len(tensors)} tensors were given, the inputs are {self.metadata['inputs'].splitlines()}"
            )
        # A compiled model reads whatever memory it gets as what it was compiled for.
        for (name, dtype, shape), tensor in zip(self._inputs, tensors, strict=True):
            dims = 0 if shape == "-" else shape.count(",") + 1
            if tensor.dtype != getattr(torch, dtype) or tensor.dim() != dims:
                raise TypeError(
                    f"{name} must be {dtype} with {dims} dimensions, got {tensor.dtype} with {tensor.dim()}"
                )
        with torch.no_grad():
            outputs: tuple[Tensor, ...] = tuple(self._run(*tensors))
        return outputs


def load_exported(path: str | os.PathLike[str], *, verify: bool = False) -> ExportedModel:
    """Load what :func:`torchrec_mpe.export` wrote, in either form.

    On the CPU weights that lie beside the file are used where they are mapped: processes share them.

    Args:
        path (PathLike): the .pt2 file.
        verify (bool): read weights that lie beside the file, and check their digest.

    Raises:
        FileNotFoundError: if the file or its weights are missing.
        ValueError: if it is no exported model, or its weights are damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no exported model {file}")
    try:
        with zipfile.ZipFile(file) as archive:
            compiled = any("/data/aotinductor/" in name for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file} is no exported model: {error}") from error
    return _load_compiled(file, verify) if compiled else _load_program(file, verify)


def _load_compiled(file: Path, verify: bool) -> ExportedModel:
    model = load_package(file)
    metadata = _checked(file, model.get_metadata())
    if "weights_file" not in metadata:
        return ExportedModel(model, metadata)
    weights = map_weights(file, metadata, verify=verify)
    constants = {name: weights[name].to(metadata["device"]) for name in model.get_constant_fqns()}
    model.load_constants(constants, check_full_update=True, user_managed=True)

    def run(*tensors: Tensor) -> Any:
        # The model does not own its constants: they live as long as this function.
        return model(*tensors) if constants else ()

    return ExportedModel(run, metadata)


def _load_program(file: Path, verify: bool) -> ExportedModel:
    extra = {METADATA_FILE: ""}
    with open(file, "rb") as stream:
        program = torch.export.load(stream, extra_files=extra)
    metadata = _checked(file, json.loads(extra[METADATA_FILE] or "{}"))
    module = program.module()
    if "weights_file" in metadata:
        weights = map_weights(file, metadata, verify=verify)
        state = {name: weights[name].to(metadata["device"]) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
    return ExportedModel(module, metadata)


def _checked(file: Path, metadata: Mapping[str, str]) -> Mapping[str, str]:
    if "torchrec_mpe" not in metadata or "inputs" not in metadata:
        raise ValueError(f"{file} was not written by torchrec_mpe.export")
    return metadata
