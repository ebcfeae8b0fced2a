"""A prepared folder, read memory-mapped."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torchrec.datasets.utils import Batch

from torchrec_mpe.app.data.arrays import map_array
from torchrec_mpe.app.data.batching import Bags, BatchBuilder, as_tensor, count_batches, row_selections
from torchrec_mpe.app.data.split import SPLITS
from torchrec_mpe.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Field:
    """One sparse feature: ids run from 0 to ``num_embeddings - 1``, most frequent first.

    Values too rare for an id of their own, and values not seen in training rows, have the id ``shared_id``. A
    ``multi_valued`` field has any number of ids a row, also none; the others have exactly one.
    """

    name: str
    num_embeddings: int
    shared_id: int
    multi_valued: bool


class PreparedDataset:
    """A log prepared by :func:`prepare_log`.

    Attributes:
        path: the folder.
        fields: the sparse features, in the order of the batches' keys.
        dense_names: the dense features, in the order of the batches' columns.
        manifest: what manifest.json holds: source, label rule, split, row counts, dropped columns, versions.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.fields = tuple(
            Field(field["name"], field["num_embeddings"], field["shared_id"], field["multi_valued"])
            for field in manifest["fields"]
        )
        self.dense_names: tuple[str, ...] = tuple(manifest["dense"])
        self._builders = {split: self._builder(split) for split in SPLITS}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "PreparedDataset":
        """Open a prepared folder; the arrays are mapped, not read.

        Raises:
            UserError: if ``path`` is no prepared folder, of another format version, or a file is missing or of the
                wrong shape.
        """
        folder = Path(path)
        file = folder / "manifest.json"
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the folder of prepared data")
        if not file.is_file():
            raise UserError(f"{folder} holds no manifest.json, so it is no prepared data: prepare a log into it first")
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            version = manifest["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{file} is damaged: prepare the log again") from None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{file} is of format version {version!r}, and this version reads {FORMAT_VERSION}: "
                "prepare the log again"
            )
        try:
            return cls(folder, manifest)
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{file} is damaged: prepare the log again") from None

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence a column that the preparation left out."""
        return tuple(f"{drop['name']} is left out as a {drop['as']}: it {drop['reason']}" for drop in self._dropped)

    @property
    def _dropped(self) -> list[dict[str, str]]:
        dropped: list[dict[str, str]] = self.manifest["dropped"]
        return dropped

    def num_rows(self, split: str) -> int:
        """Number of rows of "train", "validation" or "test"."""
        self._check(split)
        rows: int = self.manifest["splits"][split]["rows"]
        return rows

    def counts(self, field: str) -> torch.Tensor:
        """int64 [num_embeddings]: how often each id of the field occurs in the training rows; it never rises.

        Raises:
            KeyError: if there is no such field.
        """
        return torch.from_numpy(self.vocabulary(field)["count"].to_numpy(writable=True))

    def vocabulary(self, field: str) -> pl.DataFrame:
        """Values by id: row i has ``value`` (String; null for the shared id) and ``count`` (Int64) of id i.

        Raises:
            KeyError: if there is no such field.
        """
        for entry, known in zip(self.manifest["fields"], self.fields, strict=True):
            if known.name == field:
                file = self.path / entry["vocabulary"]
                try:
                    table = pl.read_parquet(file)
                except (OSError, pl.exceptions.PolarsError):
                    raise UserError(f"{file} is missing or damaged: prepare the log again") from None
                if table.height != known.num_embeddings:
                    raise UserError(
                        f"{file} has {table.height} rows, not {known.num_embeddings}: prepare the log again"
                    )
                return table
        raise KeyError(f"no field {field!r}: the fields are {', '.join(known.name for known in self.fields)}")

    def num_batches(self, split: str, batch_size: int, *, drop_last: bool = False, world_size: int = 1) -> int:
        """How many batches :meth:`batches` yields on each rank."""
        return count_batches(self.num_rows(split), batch_size, drop_last=drop_last, world_size=world_size)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> Iterator[Batch]:
        """Iterate once over a split.

        Each global batch of ``batch_size * world_size`` rows is cut into one batch a rank, so that all ranks get the
        same number of batches. What is left at the end makes a last, smaller batch; where fewer rows than ranks are
        left, they join the batch before it instead, which then has up to one row more a rank.

        Args:
            split: "train", "validation" or "test".
            batch_size: rows of a batch of one rank, B.
            shuffle_seed: None keeps the order of the file; a number, the same on all ranks, shuffles. Up to 2**22 rows
                are permuted fully, more in pieces.
            drop_last: leave out the last global batch if it is not full.
            rank: which part of each global batch to take.
            world_size: number of ranks.
            start: the first batch to yield, for a job that resumes; the batches before it are not read.

        Yields:
            Batches with ``dense_features`` float32 [B, dense features], ``labels`` float32 [B], and
            ``sparse_features``, a KeyedJaggedTensor whose keys are the field names and whose values and lengths are
            int64.

        Raises:
            ValueError: if an argument is out of range, or the split has fewer rows than there are ranks.
        """
        self._check(split)
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} and world_size {world_size} do not fit together")
        if self.num_rows(split) < world_size:
            raise ValueError(
                f"the {split} split has {self.num_rows(split)} rows, which {world_size} ranks cannot share"
            )
        if shuffle_seed is not None and shuffle_seed < 0:
            raise ValueError(f"shuffle_seed {shuffle_seed} is negative")
        if start < 0:
            raise ValueError(f"start {start} is negative")
        selections = row_selections(
            self.num_rows(split),
            batch_size,
            shuffle_seed=shuffle_seed,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            start=start,
        )
        return map(self._builders[split].build, selections)

    def _check(self, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: the splits are {', '.join(SPLITS)}")

    def _builder(self, split: str) -> BatchBuilder:
        rows = self.num_rows(split)
        single = sum(not field.multi_valued for field in self.fields)
        bags = [
            self._bags(split, index, rows) if field.multi_valued else None for index, field in enumerate(self.fields)
        ]
        return BatchBuilder(
            [field.name for field in self.fields],
            as_tensor(self._array(split, "labels", np.float32, (rows,))),
            as_tensor(self._array(split, "ids", np.int32, (rows, single))),
            as_tensor(self._array(split, "dense", np.float32, (rows, len(self.dense_names)))),
            bags,
            [field.num_embeddings for field in self.fields],
            self.path / split,
        )

    def _bags(self, split: str, field: int, rows: int) -> Bags:
        offsets = self._array(split, f"{field}.offsets", np.int64, (rows + 1,))
        values = self._array(split, f"{field}.values", np.int32, (int(offsets[-1]),))
        return Bags(as_tensor(values), as_tensor(offsets))

    def _array(self, split: str, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        file = self.path / split / f"{name}.npy"
        try:
            array = map_array(file)
        except FileNotFoundError:
            raise UserError(f"{file} is missing: prepare the log again") from None
        except (ValueError, EOFError):
            raise UserError(f"{file} is damaged: prepare the log again") from None
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"{file} is {array.dtype} {list(array.shape)}, and the manifest wants {np.dtype(dtype)} {list(shape)}: "
                "prepare the log again"
            )
        return array
