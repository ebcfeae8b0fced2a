"""The backing stores of sharded cached tables as ShardedTensors: what goes into a state dict."""

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.upstream.sharded_tensor import (
    Shard,
    ShardedTensor,
    ShardedTensorMetadata,
    ShardMetadata,
    TensorProperties,
    from_local_shards,
)

_WIDE_ROWS = "wide_rows_digest"
_ROWS_PER_CHUNK = 1 << 20  # a multiple of 8


@dataclass(frozen=True, eq=False)
class CachedShard:
    """This rank's part of a cached table.

    Attributes:
        name (str): of the table.
        first_row, first_column (int): where it starts in the table.
        rows, columns (int): its size; it may have no rows.
        emb_module (CachedTableBatchedEmbeddingBags): that holds it.
        table (int): its number there.
    """

    name: str
    first_row: int
    first_column: int
    rows: int
    columns: int
    emb_module: CachedTableBatchedEmbeddingBags
    table: int

    def read(self, start: int, stop: int) -> Tensor:
        """Values of some of its rows, counted from its first, float32 [stop - start, columns]."""
        return self.emb_module.read_rows(self.table, start, stop - start)

    def read_rows(self, rows: Tensor) -> Tensor:
        """Values of some distinct rows, int64 [n], counted from its first, float32 [n, columns]."""
        return self.emb_module.read_distinct_rows(self.table, rows)

    def write(self, start: int, values: Tensor) -> None:
        """Set rows from ``start`` on, and clear their optimizer state."""
        self.emb_module.write_rows(self.table, start, values)

    def progress(self) -> Tensor:
        """Batch number and counters, int64 [7], in the TBE's memory: see its ``checkpoint_tensors``."""
        return self.emb_module.checkpoint_tensors(self.table)["progress"]

    def stored(self) -> dict[str, Tensor]:
        """Its stored rows and lookup counts by kind, uint8 [rows of the kind, bytes a row], in the TBE's memory."""
        tensors = self.emb_module.checkpoint_tensors(self.table)
        found = {"rows4": tensors["rows4"], "rows8": tensors["rows8"], "row_counts": tensors["row_counts"][:, None]}
        # The row that stands for none is not the table's.
        return {kind: tensor for kind, tensor in found.items() if len(tensor) and self.rows}


@dataclass(frozen=True)
class _Part:
    """What one rank stores of one kind of a table: what the others have to know of it."""

    table: str
    kind: str
    first_row: int
    first_column: int
    shape: tuple[int, int]
    placement: str


class CachedState:
    """The stores of a collection's cached tables, sharded like them.

    A table has a uint8 ShardedTensor ``rows4`` of its 4-bit rows, ``rows8`` of its 8-bit rows, or both, and with an LFU
    cache ``row_counts``. Rows of a kind are in the order of their numbers. Column shards are side by side, each with
    codes, scale, offset and optimizer state of its own, so such a store fits the same column shards only. A table with
    rows of both widths has a ``wide_rows_digest`` as well, int64 [], for its store fits the same wide rows only.

    Making it is a collective.

    Args:
        shards (Iterable[CachedShard]): of this rank.
        group (Optional[ProcessGroup]): of the ranks; alone if None.
        wide_rows (Mapping[str, int]): :func:`wide_rows_digest` of the tables that have one, the same on all ranks.
    """

    def __init__(
        self, shards: Iterable[CachedShard], group: dist.ProcessGroup | None, wide_rows: Mapping[str, int]
    ) -> None:
        self.wide_rows = dict(wide_rows)
        self._shards = {(s.name, s.first_row, s.first_column): s for s in shards}
        self._group = group
        rank = dist.get_rank()
        mine = [
            _Part(name, kind, row, column, (len(tensor), tensor.shape[1]), f"rank:{rank}/{tensor.device}")
            for (name, row, column), shard in self._shards.items()
            for kind, tensor in shard.stored().items()
        ]
        gathered: list[list[_Part]] = [[]] * dist.get_world_size(group)
        dist.all_gather_object(gathered, mine, group=group)
        by_tensor: dict[tuple[str, str], list[_Part]] = {}
        for part in (part for of_rank in gathered for part in of_rank):
            by_tensor.setdefault((part.table, part.kind), []).append(part)
        self._layout = {key: _side_by_side(parts) for key, parts in sorted(by_tensor.items())}

    def names(self, table: str) -> list[str]:
        """The names of a table's :meth:`tensors`, equal on all ranks."""
        kinds = [kind for name, kind in self._layout if name == table]
        return [f"{table}.{kind}" for kind in [*kinds, *([_WIDE_ROWS] if table in self.wide_rows else [])]]

    def flush(self) -> None:
        """Write cached rows back to the stores and empty the caches, once no batch is in flight.

        Raises:
            RuntimeError: naming the tables, if one of their batches waits for its backward; nothing has changed.
        """
        check_idle(self._shards.values())
        for tbe in _distinct(self._shards.values()):
            tbe.flush()

    def tensors(self) -> dict[str, Tensor]:
        """:meth:`sharded_tensors`, and digests of wide rows, by ``<table>.<kind>``; up to date after a flush only."""
        digests = {f"{table}.{_WIDE_ROWS}": torch.tensor(digest) for table, digest in self.wide_rows.items()}
        return {**self.sharded_tensors(), **digests}

    def sharded_tensors(self) -> dict[str, ShardedTensor]:
        """ShardedTensors by ``<table>.<kind>``, in the stores' memory; up to date after a flush only."""
        stored = {key: shard.stored() for key, shard in self._shards.items()}
        found: dict[str, ShardedTensor] = {}
        for (table, kind), layout in self._layout.items():
            shards = [
                Shard(stored[table, row, column][kind], metadata)
                for (row, column), metadata in layout.items()
                if kind in stored.get((table, row, column), {})
            ]
            every = list(layout.values())
            size = torch.Size(max(s.shard_offsets[k] + s.shard_sizes[k] for s in every) for k in (0, 1))
            metadata = ShardedTensorMetadata(every, size, TensorProperties(dtype=torch.uint8))
            found[f"{table}.{kind}"] = from_local_shards(shards, metadata, self._group)
        return found

    def check(self, loaded: Mapping[str, Mapping[str, Any]]) -> None:
        """Make sure that tables can be loaded, before any of them is.

        Args:
            loaded (Mapping[str, Mapping[str, Any]]): by table, all of its :meth:`tensors`.

        Raises:
            ValueError: naming the table, if one has other wide rows or is sharded in another way.
        """
        targets = self.sharded_tensors()
        for table, tensors in loaded.items():
            digest = tensors.get(f"{table}.{_WIDE_ROWS}")
            if digest is not None and int(digest) != self.wide_rows[table]:
                raise ValueError(
                    f"table {table} stores other rows in 8 bits here than when its state was saved: give the "
                    "CachedEmbeddingBagCollection the precision plan that it was trained with"
                )
            for name in tensors.keys() & targets.keys():
                source, ours = ([_place(s) for s in _local_shards(t)] for t in (tensors[name], targets[name]))
                if source != ours:
                    raise ValueError(
                        f"{name} is sharded as {source}, here as {ours}: load it through torch.distributed.checkpoint, "
                        "which moves rows between ranks"
                    )

    def load(self, loaded: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over tables that passed :meth:`check`, and empty the caches that have any of them.

        Of other tables in the same TBEs cached rows are dropped as well: flush first.
        """
        targets = self.sharded_tensors()
        for tensors in loaded.values():
            for name in tensors.keys() & targets.keys():
                for shard, other in zip(_local_shards(targets[name]), _local_shards(tensors[name]), strict=True):
                    if shard.tensor.data_ptr() != other.tensor.data_ptr():
                        shard.tensor.copy_(other.tensor)
        for tbe in _distinct(shard for shard in self._shards.values() if shard.name in loaded):
            tbe.checkpoint_loaded()


def check_idle(shards: Iterable[CachedShard]) -> None:
    """Make sure that rows of some shards may be set.

    Raises:
        RuntimeError: naming the tables, if one of their batches waits for its backward.
    """
    shards = list(shards)
    if any(shard.emb_module.waits_for_backward for shard in shards):
        gc.collect()  # a dropped graph may be in a reference cycle, as after row-wise lookups
    if busy := sorted({shard.name for shard in shards if shard.emb_module.waits_for_backward}):
        raise RuntimeError(
            f"tables {', '.join(busy)} have a forward that waits for its backward, so nothing can be loaded into them: "
            "drop the outputs of earlier forwards (for example `del loss`), or run their backward, before loading"
        )


def wide_rows_digest(wide_rows: Callable[[str, int, int], Tensor | None], table: str, rows: int) -> int | None:
    """What tells which rows of a table are stored in 8 bits, 63 bits; None if all rows have equally many.

    Args:
        wide_rows (Callable): of a table's name, first and last row + 1, as CachedEmbeddingBagCollection has it.
        table (str): its name.
        rows (int): of the whole table.
    """
    digest, wide = hashlib.sha256(), 0
    for start in range(0, rows, _ROWS_PER_CHUNK):
        chunk = wide_rows(table, start, min(start + _ROWS_PER_CHUNK, rows))
        if chunk is None:
            return None
        wide += int(chunk.sum())
        digest.update(np.packbits(chunk.cpu().numpy()).tobytes())
    return int.from_bytes(digest.digest()[:8], "little") >> 1 if 0 < wide < rows else None


def _distinct(shards: Iterable[CachedShard]) -> Iterator[CachedTableBatchedEmbeddingBags]:
    """The TBEs of some shards, each once."""
    yield from {id(shard.emb_module): shard.emb_module for shard in shards}.values()


def _local_shards(tensor: Any) -> list[Shard]:
    return list(tensor.local_shards()) if isinstance(tensor, ShardedTensor) else []


def _side_by_side(parts: list[_Part]) -> dict[tuple[int, int], ShardMetadata]:
    """Where each shard's part of a tensor lies, by its first row and first column in the table."""
    layout: dict[tuple[int, int], ShardMetadata] = {}
    first_byte = 0
    for column in sorted({part.first_column for part in parts}):
        of_column = sorted((p for p in parts if p.first_column == column), key=lambda p: p.first_row)
        first_row = 0
        for part in of_column:
            layout[part.first_row, column] = ShardMetadata([first_row, first_byte], list(part.shape), part.placement)
            first_row += part.shape[0]
        first_byte += of_column[0].shape[1]
    return layout


def _place(shard: Shard) -> tuple[list[int], list[int]]:
    return shard.metadata.shard_offsets, shard.metadata.shard_sizes
