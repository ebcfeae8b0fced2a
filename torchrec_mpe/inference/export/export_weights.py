"""Weights beside an exported model: one file that processes map instead of reading it."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64  # a cache line, as the packed rows want it


def write_weights(package: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors to a file beside ``package``, each at a multiple of 64 bytes.

    The file's name holds its digest: an earlier package keeps the file that it was written with.

    Args:
        package (Path): the exported model's file.
        tensors (Mapping[str, Tensor]): by name; on any device.

    Returns:
        Dict[str, str]: for the package's metadata: ``weights_file`` (a name in the package's folder),
            ``weights_bytes``, ``weights_sha256``, and ``weights``, one line a tensor: offset in bytes, dtype,
            dimensions joined by commas ("-" for none) and name.
    """
    lines: list[str] = []
    offset = 0
    for name, tensor in tensors.items():
        dims = ",".join(str(size) for size in tensor.shape) or "-"
        lines.append(f"{offset} {str(tensor.dtype).removeprefix('torch.')} {dims} {name}")
        offset += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    digest = hashlib.sha256()
    for piece in _pieces(tensors):
        digest.update(piece)
    target = package.with_name(f"{package.stem}-{digest.hexdigest()[:12]}.weights")
    with open(target, "wb") as file:
        for piece in _pieces(tensors):
            file.write(piece)
    return {
        "weights_file": target.name,
        "weights_bytes": str(offset),
        "weights_sha256": digest.hexdigest(),
        "weights": "\n".join(lines),
    }


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """The file's content, tensor by tensor."""
    for tensor in tensors.values():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield data.data
        yield bytes(-len(data) % _ALIGNMENT)


def map_weights(
    package: str | os.PathLike[str], metadata: Mapping[str, str], *, verify: bool = False
) -> dict[str, Tensor]:
    """Map what :func:`write_weights` wrote: nothing is read before it is used, and processes share the pages.

    Args:
        package (PathLike): the exported model's file, in whose folder the weights lie.
        metadata (Mapping[str, str]): the package's.
        verify (bool): read the whole file and check its digest.

    Returns:
        Dict[str, Tensor]: by name, on the CPU. They are the file's pages, mapped copy-on-write: do not write to them.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if its size, or with ``verify`` its digest, is not what the package says.
    """
    folder, name = Path(package).parent, metadata["weights_file"]
    if name != Path(name).name:
        raise ValueError(f"{package} names a file outside its folder: {name!r}")
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{package} was exported with its weights beside it: {file} is missing")
    size = int(metadata["weights_bytes"])
    if file.stat().st_size != size:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, {package} was exported with {size}")
    content = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0).byte()
    if verify and hashlib.sha256(content.numpy().data).hexdigest() != metadata["weights_sha256"]:
        raise ValueError(f"{file} is damaged: its digest is not what {package} says")
    tensors: dict[str, Tensor] = {}
    for line in metadata["weights"].splitlines():
        offset, dtype_name, dims, name = line.split(" ", 3)
        shape = [] if dims == "-" else [int(size) for size in dims.split(",")]
        dtype: torch.dtype = getattr(torch, dtype_name)
        count = torch.Size(shape).numel() * dtype.itemsize
        start = int(offset)
        if not 0 <= start <= start + count <= size or start % _ALIGNMENT:
            raise ValueError(f"{package} places {name} outside {file}")
        tensors[name] = content[start : start + count].view(dtype).view(shape)
    return tensors
