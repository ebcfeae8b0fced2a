"""New rows for a served model, as a file."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.files.document import DocumentFormat
from torchrec_mpe.files.tensors_file import read_tensors
from torchrec_mpe.packing.update import TableRows

_FORMAT = DocumentFormat("torchrec_mpe.delta", 1, "a delta of rows, as save_delta writes them")


def save_delta(path: str | os.PathLike[str], rows: Mapping[str, TableRows]) -> None:
    """Write rows for ``apply_update`` to a safetensors file, which appears complete or not at all.

    Its tensors are ``ids.<table>``, int64 [n], and ``values.<table>``, float32 [n, D].

    Args:
        path (PathLike): a file, replaced if it exists.
        rows (Mapping[str, tuple[Tensor, Tensor]]): by table, ids, int32 or int64 [n], and values, float32 [n, D].

    Raises:
        TypeError: naming the table, if ids or values have another dtype.
        ValueError: naming the table, if the shapes do not fit each other.
    """
    tensors: dict[str, Tensor] = {}
    for name, (ids, values) in rows.items():
        _check(name, ids, values)
        tensors[f"ids.{name}"] = ids.detach().to("cpu", torch.int64, copy=True)
        tensors[f"values.{name}"] = values.detach().to("cpu", copy=True).contiguous()
    with atomic_file(path) as file:
        save_file(tensors, file, metadata=_FORMAT.text_header())


def load_delta(path: str | os.PathLike[str]) -> dict[str, TableRows]:
    """Read what :func:`save_delta` wrote.

    Whether ids and values fit the tables is for ``apply_update`` to say, which changes nothing if they do not.

    Args:
        path (PathLike): the file.

    Returns:
        dict[str, tuple[Tensor, Tensor]]: by table, ids, int64 [n], and values, float32 [n, D], on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or no delta.
    """
    path = Path(path)
    tensors = read_tensors(path, _FORMAT)
    rows: dict[str, TableRows] = {}
    for key in sorted(tensors):
        kind, _, name = key.partition(".")
        other = {"ids": f"values.{name}", "values": f"ids.{name}"}.get(kind)
        if other not in tensors:
            raise ValueError(f"{path} is damaged: tensor {key!r} has no ids or values beside it")
        rows[name] = (tensors[f"ids.{name}"], tensors[f"values.{name}"])
    for name, (ids, values) in rows.items():
        try:
            _check(name, ids, values)
        except TypeError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return rows


def _check(name: str, ids: Tensor, values: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64) or values.dtype != torch.float32:
        raise TypeError(
            f"table {name}: ids must be int32 or int64 and values float32, got {ids.dtype} and {values.dtype}"
        )
    if ids.dim() != 1 or values.dim() != 2 or len(ids) != len(values):
        raise ValueError(
            f"table {name}: ids must be [n] and values [n, D], got {list(ids.shape)} and {list(values.shape)}"
        )
