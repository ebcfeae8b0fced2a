"""The tensors of checkpoints of any origin, read a few rows at a time and without running code from them."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from torchrec_mpe.upstream import checkpoint as dcp

_LFS_POINTER = b"version https://git-lfs"
_DEEPEST = 100  # dictionaries in dictionaries
_SAFETENSORS_FLOATS = {"F64", "F32", "F16", "BF16"}


class CheckpointFiles(Protocol):
    """The floating point tensors of a checkpoint."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the tensors, by key, in the checkpoint's order."""
        ...

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop - 1`` of a matrix as float32, on the CPU."""
        ...


def open_checkpoint(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> CheckpointFiles:
    """Open a checkpoint; no tensor is read yet.

    ====================================================  ==========================================================
    a ``.safetensors`` file, or a folder of such files    read by row ranges
    a file of ``torch.save``                              memory-mapped, loaded with ``weights_only=True``; tensors in
                                                          nested dictionaries have keys joined by dots
    a folder of ``torch.distributed.checkpoint`` (DCP)    one tensor at a time, as it is stored, and beside it the
                                                          stored shard that is being read
    ====================================================  ==========================================================

    Args:
        path (PathLike): file or folder.
        allow_pickle (bool): DCP's ``.metadata`` is a pickle, which can run any code: True for a folder whose writer you
            trust.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if it is no such checkpoint, or one of DCP without ``allow_pickle``.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.is_dir():
        if (path / dcp.INDEX_FILE).is_file():
            if not allow_pickle:
                raise ValueError(
                    f"{path} is a checkpoint of torch.distributed.checkpoint, whose .metadata is a pickle that can run "
                    "any code: allow pickle if you trust who wrote it"
                )
            return _DcpFolder(path)
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{path} is a folder without .safetensors files and without DCP's .metadata")
        for file in files:
            _check_no_pointer(file)
        return _SafetensorsFiles(files)
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder")
    _check_no_pointer(path)
    return _SafetensorsFiles([path]) if path.suffix == ".safetensors" else _TorchFile(path)


def _check_no_pointer(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{file} is a git-lfs pointer, not the file it stands for: fetch that by `git lfs pull`")


class _SafetensorsFiles:
    def __init__(self, files: list[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118
                        entry = opened.get_slice(key)
                        if entry.get_dtype() not in _SAFETENSORS_FLOATS:
                            continue
                        if key in self._file_of:
                            raise ValueError(f"{key} is both in {self._file_of[key]} and in {file}")
                        self.shapes[key], self._file_of[key] = tuple(entry.get_shape()), file
            except SafetensorError as error:
                raise ValueError(f"{file} cannot be read as safetensors: {str(error).splitlines()[0]}") from error

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        with safe_open(self._file_of[key], framework="pt") as opened:
            rows: Tensor = opened.get_slice(key)[start:stop].float()
        return rows


class _TorchFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged pickle raises anything
            raise ValueError(
                f"{path} cannot be read by torch.load with weights_only=True and mmap=True: {_reason(path, error)}; "
                "save the state dict alone, of plain tensors, with torch.save or as safetensors"
            ) from error
        self._tensors: dict[str, Tensor] = {}
        self._add("", content, ())
        if not self._tensors:
            raise ValueError(f"{path} holds no floating point tensors")
        self.shapes: dict[str, tuple[int, ...]] = {key: tuple(t.shape) for key, t in self._tensors.items()}

    def _add(self, key: str, value: object, inside: tuple[int, ...]) -> None:
        if isinstance(value, Mapping):
            if id(value) in inside or len(inside) == _DEEPEST:
                what = "holds itself" if id(value) in inside else f"lies in {_DEEPEST} others"
                raise ValueError(
                    f"{self._path}: the dictionary {key:.200} {what}: save the state dict alone, with torch.save or as "
                    "safetensors"
                )
            for name, entry in value.items():
                self._add(f"{key}.{name}" if key else str(name), entry, (*inside, id(value)))
        elif isinstance(value, Tensor) and value.is_floating_point():
            self._tensors[key] = value.detach()

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        tensor = self._tensors[key]
        # A DTensor or another subclass may hold one shard only.
        what = type(tensor).__name__ if type(tensor) not in (Tensor, nn.Parameter) else None
        if what or tensor.layout != torch.strided or tensor.is_meta:
            what = what or ("tensor on the meta device" if tensor.is_meta else f"{tensor.layout} tensor")
            raise ValueError(f"{self._path}: {key} is a {what}: save the state dict with whole, dense tensors")
        return tensor[start:stop].float()


def _reason(path: Path, error: Exception) -> str:
    """Why torch.load fails, in a few words: its own are a page, with colors."""
    if not zipfile.is_zipfile(path):
        return "it was not written by torch.save since torch 1.6, or is damaged"
    try:
        classes = sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # as above
        classes = []
    if classes:
        more = f" and {len(classes) - 3} more" if len(classes) > 3 else ""
        return f"besides tensors it holds {', '.join(classes[:3])}{more}"
    first = re.sub(r"\x1b\[[0-9;]*m", "", (str(error).splitlines() or [""])[0])
    return f"it is damaged ({type(error).__name__})" if "Weights only load failed" in first else first[:200]


class _DcpFolder:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            saved = dcp.saved_tensors(path)
        except dcp.LoadError as error:
            raise ValueError(str(error)) from error
        self._dtypes = {key: tensor.dtype for key, tensor in saved.items() if tensor.dtype.is_floating_point}
        self.shapes: dict[str, tuple[int, ...]] = {key: saved[key].size for key in self._dtypes}
        self._loaded: tuple[str, Tensor] | None = None

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # the table before gives its memory back first
            tensor = torch.empty(self.shapes[key], dtype=self._dtypes[key])
            try:
                dcp.load_alone({key: tensor}, self._path)
            except dcp.LoadError as error:
                raise ValueError(f"{self._path}: {key} cannot be read: {error}") from error
            self._loaded = key, tensor
        return self._loaded[1][start:stop].float()
