"""A checkpoint's tables coded as they are, without the job that trained them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchrec_mpe.coding.code_tables import TableSummary
from torchrec_mpe.inference.compress.code_collections import CollectionToCode, code_collections
from torchrec_mpe.inference.compress.compress import Unseen, read_unseen_
from torchrec_mpe.inference.convert.checkpoint_files import CheckpointFiles, open_checkpoint
from torchrec_mpe.inference.convert.checkpoint_tables import CheckpointTable, find_tables, locate_tables
from torchrec_mpe.precision.row_histograms import read_pieces


@dataclass(frozen=True)
class CheckpointRows:
    """The rows of a checkpoint's table, all owned by this process, a few MiB in memory at a time."""

    files: CheckpointFiles
    key: str
    table: CheckpointTable

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """See :class:`torchrec_mpe.coding.owned_rows.OwnedRows`."""
        config = self.table.config
        return read_pieces(
            config.name,
            lambda start, stop: self.files.rows(self.key, start, stop),
            config.embedding_dim,
            config.num_embeddings,
        )

    def rows(self, ids: Tensor) -> Tensor:
        """See :class:`torchrec_mpe.coding.owned_rows.OwnedRows`; reads the whole table."""
        found = torch.zeros(len(ids), self.table.config.embedding_dim)
        for first, piece in self.pieces():
            here = ((ids >= first) & (ids < first + len(piece))).nonzero().squeeze(1)
            found[here] = piece[ids[here] - first]
        return found

    def sum(self, values: Tensor) -> Tensor:
        """See :class:`torchrec_mpe.coding.owned_rows.OwnedRows`."""
        return values


@dataclass(frozen=True)
class CompressedCheckpoint:
    """What :func:`compress_checkpoint` made.

    Attributes:
        model (nn.Module): a PackedEmbeddingBagCollection; a ModuleDict of two, "unweighted" and "weighted", if only
            some tables are looked up with per-sample weights.
        summaries (Mapping[str, TableSummary]): by table.
    """

    model: nn.Module
    summaries: Mapping[str, TableSummary]


def compress_checkpoint(
    path: str | os.PathLike[str],
    tables: Sequence[CheckpointTable] | None,
    counts: Mapping[str, Tensor],
    curvature: Mapping[str, Tensor] | None = None,
    *,
    ratio: float | None = None,
    bytes: int | None = None,
    max_components: int | None = None,
    unseen: Unseen = "mean",
    allow_pickle: bool = False,
    progress: bool = False,
) -> CompressedCheckpoint:
    """Transform-code a checkpoint's tables to a number of bytes; the dense network is not touched, nor known.

    Rows are read in pieces of a few MiB; see :func:`open_checkpoint` for what stays in memory besides.

    Args:
        path (PathLike): a checkpoint that :func:`open_checkpoint` reads.
        tables (Optional[Sequence[CheckpointTable]]): in the collection's order. None: the tables of all
            EmbeddingBagCollections, as :func:`find_tables` finds them.
        counts, curvature, ratio, bytes, max_components, unseen, progress: as of :func:`torchrec_mpe.compress`.
        allow_pickle (bool): read DCP's pickled metadata.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        KeyError: naming the table, if checkpoint, counts or curvature lack it.
        ValueError: if the checkpoint cannot be read; otherwise as of :func:`torchrec_mpe.compress`.
    """
    files = open_checkpoint(path, allow_pickle=allow_pickle)
    tables = find_tables(files) if tables is None else tables
    keys = locate_tables(files, tables)
    parts = {weighted: [table for table in tables if table.weighted == weighted] for weighted in (False, True)}
    collections = {
        "weighted" if weighted else "unweighted": CollectionToCode(
            [table.config for table in chosen],
            {t.config.name: CheckpointRows(files, keys[t.config.name], t) for t in chosen},
            weighted,
        )
        for weighted, chosen in parts.items()
        if chosen
    }
    coded = code_collections(
        list(collections.values()),
        counts,
        curvature,
        ratio=ratio,
        bytes=bytes,
        max_components=max_components,
        progress=progress,
    )
    packed = dict(zip(collections, coded.packed, strict=True))
    model = nn.ModuleDict(packed) if len(packed) > 1 else next(iter(packed.values()))
    if unseen == "model":
        read_unseen_(model, coded.unseen_means())
    return CompressedCheckpoint(model.eval(), coded.summaries)
