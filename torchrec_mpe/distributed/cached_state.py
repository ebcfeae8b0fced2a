"""The backing stores of sharded cached tables as ShardedTensors: what goes into a state dict."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard

from torchrec_mpe.cache import CachedTableBatchedEmbeddingBags


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
    codes, scale, offset and optimizer state of its own, so such a store fits the same column shards only.

    Making it is a collective.

    Args:
        shards (Iterable[CachedShard]): of this rank.
        group (Optional[ProcessGroup]): of the ranks; alone if None.
    """

    def __init__(self, shards: Iterable[CachedShard], group: dist.ProcessGroup | None) -> None:
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

    def names(self) -> list[str]:
        """The names of :meth:`sharded_tensors`, equal on all ranks."""
        return [f"{table}.{kind}" for table, kind in self._layout]

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
            found[f"{table}.{kind}"] = ShardedTensor._init_from_local_shards_and_global_metadata(
                shards, sharded_tensor_metadata=metadata, process_group=self._group
            )
        return found

    def load(self, loaded: Mapping[str, Any]) -> None:
        """Take over ShardedTensors of :meth:`sharded_tensors` of the same sharding, and empty the caches.

        Raises:
            ValueError: naming the table, if one is sharded in another way.
        """
        targets = self.sharded_tensors()
        for name in loaded:
            target = targets[name]
            source = loaded[name].local_shards() if isinstance(loaded[name], ShardedTensor) else []
            ours = target.local_shards()
            if [_place(s) for s in source] != [_place(s) for s in ours]:
                raise ValueError(
                    f"{name} is sharded as {[_place(s) for s in source]}, here as {[_place(s) for s in ours]}: load it "
                    "through torch.distributed.checkpoint, which moves rows between ranks"
                )
            for shard, other in zip(ours, source, strict=True):
                if shard.tensor.data_ptr() != other.tensor.data_ptr():
                    shard.tensor.copy_(other.tensor)
        for tbe in {id(shard.emb_module): shard.emb_module for shard in self._shards.values()}.values():
            tbe.checkpoint_loaded()


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
