"""Safetensors files that can be memory-mapped: written aligned, digested on the way, read without a copy."""

import hashlib
import json
import math
import mmap
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchrec_mpe.upstream.sharded_tensor import ShardedTensor

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes that are stored, by their names in safetensors."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 24
_MAX_TENSOR_BYTES = 2**63 - 1
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
# Copy-on-write, so that no write through a tensor reaches the file; and without a reservation, for a private mapping
# would otherwise count against the memory of a host that is smaller than the file. Python names the flag from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor], max_file_bytes: int) -> dict[str, Any]:
    """Write tensors to ``<stem>-0.safetensors`` and so on, a few MiB at a time.

    A tensor is never split, so that it can be mapped in one piece: a file is larger than ``max_file_bytes`` if it holds
    a single tensor that is. Tensors of a multiple of 64 bytes come first, the largest first, at multiples of 64 bytes.

    Returns:
        dict[str, Any]: of each file, the SHA-256 of its header and of each tensor's bytes, for the manifest.

    Raises:
        ValueError: naming the tensor, if it is sharded or has a dtype or layout that is not stored.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, ShardedTensor | DTensor):
            raise ValueError(f"tensor {name} is sharded: an artifact holds whole tensors")
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
            raise ValueError(f"tensor {name} is {kind}: an artifact holds dense {', '.join(map(str, _NAMES))}")
        if tensor.is_meta:
            raise ValueError(f"tensor {name} is on the meta device: it has no values to save")
    ordered = sorted(tensors, key=lambda name: _position(name, tensors[name]))
    files: list[list[str]] = []
    room = 0
    for name in ordered:
        if not files or tensors[name].nbytes > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(name)
        room -= tensors[name].nbytes
    entries: dict[str, Any] = {}
    for number, names in enumerate(files):
        file = folder / f"{stem}-{number}.safetensors"
        digests = _write_file(file, {name: tensors[name] for name in names})
        entries[file.name] = {"header_sha256": sha256_of_header(file), "tensors": digests}
    return entries


def sha256_of_header(file: Path) -> str:
    """SHA-256 of what comes before the tensors in a safetensors file, hexadecimal; it decides dtypes, shapes and size.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no safetensors file.
    """
    with file.open("rb") as stream:
        length = stream.read(8)
        size = int.from_bytes(length, "little")
        if len(length) < 8 or size > min(file.stat().st_size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{file} is damaged: it has no header")
        return hashlib.sha256(length + stream.read(size)).hexdigest()


def map_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on its pages: none is read before it is used, and processes share them.

    The header is checked against the file's size. Writing to a tensor copies the page for this process; the file never
    changes. The file must stay as it is while the tensors are in use.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is no safetensors file, or holds a dtype that is not stored.
    """
    try:
        with safe_open(file, framework="np") as header:
            # In the order of their bytes, which follow each other without gaps up to the file's end.
            entries = {name: header.get_slice(name) for name in header.offset_keys()}
            kinds = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
    for name, (dtype, shape) in kinds.items():
        if dtype not in DTYPES:
            raise ValueError(f"{file}: tensor {name!r} is of dtype {dtype}, which no artifact holds")
        # Without its zeros, for an empty tensor's other dimensions are in no file's size.
        if math.prod(size for size in shape if size) * DTYPES[dtype].itemsize > _MAX_TENSOR_BYTES:
            raise ValueError(f"{file}: tensor {name!r} has the dimensions {list(shape)!s:.100}, which no tensor has")
    sizes = {name: DTYPES[dtype].itemsize * math.prod(shape) for name, (dtype, shape) in kinds.items()}
    with file.open("rb") as stream:
        flags, protection = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        mapping = mmap.mmap(stream.fileno(), 0, flags=flags, prot=protection)
    offset = len(mapping) - sum(sizes.values())
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in kinds.items():
        if offset % DTYPES[dtype].itemsize:
            raise ValueError(f"{file}: tensor {name!r} starts at byte {offset}, where {dtype} cannot be mapped")
        tensors[name] = _view(mapping, DTYPES[dtype], shape, offset)
        offset += sizes[name]
    return tensors


def sha256_of_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, hexadecimal, a few MiB at a time."""
    digest = hashlib.sha256()
    for chunk in _chunks(tensor):
        digest.update(chunk)
    return digest.hexdigest()


def _position(name: str, tensor: Tensor) -> tuple[bool, int, str]:
    """What a file's tensors are sorted by, so that each starts at a multiple of its element size without gaps."""
    if tensor.nbytes % _ALIGNMENT == 0:
        return False, -tensor.nbytes, name
    return True, -tensor.itemsize, name


def _view(mapping: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    elements = math.prod(shape)
    if elements == 0:  # which frombuffer refuses
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=elements, offset=offset).view(shape)


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    for chunk in flat.split(_CHUNK_BYTES) if flat.numel() else ():
        yield memoryview(chunk.cpu().numpy())


def _write_file(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write one file; returns the SHA-256 of each tensor's bytes."""
    # The safetensors package writes whole copies, at multiples of 8 bytes.
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    digests: dict[str, str] = {}
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            digest = hashlib.sha256()
            for chunk in _chunks(tensor):
                digest.update(chunk)
                stream.write(chunk)
            digests[name] = digest.hexdigest()
    return digests
