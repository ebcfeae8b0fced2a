"""torch.export and AOTInductor: what they need to be told, and what their programs hold."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn
from torch.export import ExportedProgram


class CannotTraceError(Exception):
    """torch.export cannot make a program of a module for the dynamic shapes that are asked for."""


def for_any_batch() -> AbstractContextManager[None]:
    """Trace and compile for any batch; otherwise torch.export makes programs for batches of 2 and more only."""
    patched: AbstractContextManager[None] = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patched


def trace(module: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: Any) -> ExportedProgram:
    """A module's program.

    Raises:
        CannotTraceError: in torch's words.
    """
    try:
        return torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)
    except torch._dynamo.exc.UserError as error:
        raise CannotTraceError(str(error)) from error


def operator_namespaces(program: ExportedProgram) -> set[str]:
    """Namespaces of the operators that a program calls, PyTorch's own among them."""
    targets = (node.target for module in program.graph_module.modules() for node in module.graph.nodes)
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


def with_state(program: ExportedProgram, change: Callable[[Tensor], Tensor]) -> ExportedProgram:
    """A copy of a program with other parameters and buffers; the program stays as it is."""
    program = copy.copy(program)
    program._state_dict = {name: change(tensor) for name, tensor in program.state_dict.items()}
    return program


def compile_package(
    program: ExportedProgram, path: Path, metadata: Mapping[str, str], *, constants_inside: bool
) -> None:
    """Compile a program by AOTInductor into a .pt2 file, with its constants or without."""
    options: dict[str, Any] = {
        "aot_inductor.metadata": dict(metadata),
        "aot_inductor.package_constants_in_so": constants_inside,
        # Otherwise every call computes the constants of 8 elements or fewer.
        "always_keep_tensor_constants": True,
    }
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def load_package(path: Path) -> Any:
    """A compiled model: callable, with ``get_metadata``, ``get_constant_fqns`` and ``load_constants``."""
    return torch._inductor.aoti_load_package(str(path))
