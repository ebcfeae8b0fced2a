"""Tensors on disk in the format of torch.distributed.checkpoint (DCP)."""

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as _load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save
from torch.distributed.checkpoint.state_dict_saver import save as _save

INDEX_FILE = ".metadata"
"""A pickle: whoever writes it can have any code run by whoever reads it."""

TENSOR_SUFFIX = ".distcp"
"""Of the files with tensors, which the ranks write."""

DIGEST_SUFFIX = ".sha256"
"""Of a file beside a rank's own, with the SHA-256 of what the rank wrote to it, hexadecimal."""

FAILURES: tuple[type[BaseException], ...] = (Exception, CheckpointException)
"""What saving and loading raise: DCP's own exception is no Exception."""


class LoadError(Exception):
    """The index or a tensor cannot be read; says what the first failure was."""


class _DigestedStream:
    """A stream that digests what is written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        written: int = self._stream.write(data)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _DigestingFiles(FileSystem):
    """DCP's files, those of tensors each with its digest in a file beside it: reading them again would take long."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if not (mode == "wb" and str(path).endswith(TENSOR_SUFFIX)):
                yield stream
                return
            digested = _DigestedStream(stream)
            yield digested
        Path(f"{path}{DIGEST_SUFFIX}").write_text(digested.sha256.hexdigest())


def _writer(folder: str | os.PathLike[str]) -> FileSystemWriter:
    writer = FileSystemWriter(folder)
    writer.fs = _DigestingFiles()
    return writer


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint, of all shards together."""

    size: tuple[int, ...]
    dtype: torch.dtype


def saved_tensors(folder: str | os.PathLike[str]) -> dict[str, SavedTensor]:
    """The tensors of a checkpoint by name, in its order; runs code from its index, a pickle.

    Raises:
        LoadError: if the index is missing or damaged.
    """
    try:
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    except Exception as error:  # a damaged pickle raises anything
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise LoadError(f"{os.path.join(folder, INDEX_FILE)} cannot be read: {what}") from error
    return {
        name: SavedTensor(tuple(entry.size), entry.properties.dtype)
        for name, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }


def save(
    tensors: Mapping[str, Tensor], folder: str | os.PathLike[str], group: dist.ProcessGroup | None
) -> "Future[Any]":
    """Write this rank's tensors, and wait for it. Collective.

    Returns:
        Future: done, or with what was raised.
    """
    written: Future[Any] = Future()
    try:
        _save(dict(tensors), storage_writer=_writer(folder), process_group=group)
        written.set_result(None)
    except FAILURES as error:
        written.set_exception(error)
    return written


def save_in_thread(
    tensors: Mapping[str, Tensor], folder: str | os.PathLike[str], group: dist.ProcessGroup | None
) -> "Future[Any]":
    """As :func:`save`, but returns when the tensors are copied to host memory."""
    response = async_save(dict(tensors), storage_writer=_writer(folder), process_group=group)
    return response.upload_completion if isinstance(response, AsyncSaveResponse) else response


def load(tensors: Mapping[str, Tensor], folder: str | os.PathLike[str], group: dist.ProcessGroup | None) -> None:
    """Read into this rank's tensors, however the saved ones were sharded. Collective; raises :data:`FAILURES`."""
    _load(dict(tensors), storage_reader=FileSystemReader(folder), process_group=group)


def load_alone(tensors: Mapping[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """As :func:`load`, in one process that is no rank.

    Raises:
        LoadError: if a tensor is missing or damaged.
    """
    try:
        with warnings.catch_warnings():
            # It warns that it runs in one process, as it is told to.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            _load(dict(tensors), storage_reader=FileSystemReader(folder), no_dist=True)
    except CheckpointException as error:
        raise LoadError(str(next(iter(error.failures.values()))[0])) from error


def reason(error: BaseException) -> str:
    """What went wrong, in one line: DCP's own exception lists a traceback a rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (first, _) = min(error.failures.items())
        return f"{reason(first)} (on rank {rank})"
    return f"{type(error).__name__}: {error}"
