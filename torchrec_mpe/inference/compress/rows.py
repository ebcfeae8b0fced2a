"""The rows of a trained model's tables, each read on the one rank that owns it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.distributed.row_shard import RowShard, TensorShard
from torchrec_mpe.distributed.sum_over_ranks import sum_over_ranks_
from torchrec_mpe.upstream.embedding_bag_collection import (
    device_of_sharded,
    group_of_sharded,
    tables_of_sharded,
    tbes_of_sharded,
)
from torchrec_mpe.upstream.sharded_tensor import ShardedTensor
from torchrec_mpe.upstream.tbe import SplitTableBatchedEmbeddingBagsCodegen

Collection: TypeAlias = EmbeddingBagCollection | ShardedEmbeddingBagCollection

_PIECE_ELEMENTS = 1 << 20  # 4 MiB of float32
_COLUMNS_SPLIT = tuple(
    kind.value for kind in (ShardingType.COLUMN_WISE, ShardingType.TABLE_COLUMN_WISE, ShardingType.GRID_SHARD)
)


@dataclass(frozen=True, eq=False)
class OwnedShards:
    """The rows of a table that this rank owns, out of its shards: a ``torchrec_mpe.coding.owned_rows.OwnedRows``.

    A row whose columns are on several ranks is put together on one of them, and is owned there.

    Attributes:
        num_embeddings (int): rows of the table.
        embedding_dim (int): D, elements of a row.
        shards (Sequence[RowShard]): of this rank; over all ranks they cover every element of the table once.
        columns_split (bool): whether shards have a part of the columns; the same on all ranks.
        group (Optional[ProcessGroup]): of the ranks; alone if None.
        device (torch.device): where the group's collectives work.
    """

    num_embeddings: int
    embedding_dim: int
    shards: Sequence[RowShard]
    columns_split: bool = False
    group: dist.ProcessGroup | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """The id of the first row, and some rows that follow it, float32 [n, D] in host memory, of at most 4 MiB.

        Where columns are split it is a collective: every rank goes through all pieces.
        """
        step = max(1, _PIECE_ELEMENTS // self.embedding_dim)
        if self.columns_split:
            rank, ranks = (0, 1) if self.group is None else (dist.get_rank(self.group), dist.get_world_size(self.group))
            for number, start in enumerate(range(0, self.num_embeddings, step)):
                piece = self.sum(self._own_columns(start, min(start + step, self.num_embeddings)))
                if number % ranks == rank:
                    yield start, piece
            return
        for shard in self.shards:
            for start in range(0, shard.rows, step):
                yield shard.first_row + start, _host(shard.read(start, min(start + step, shard.rows)))

    def rows(self, ids: Tensor) -> Tensor:
        """Some distinct rows of the table, int64 [n]: float32 [n, D], zeros where elements are on other ranks."""
        out = torch.zeros(len(ids), self.embedding_dim)
        for shard in self.shards:
            mine = ((ids >= shard.first_row) & (ids < shard.first_row + shard.rows)).nonzero().squeeze(1)
            if len(mine):
                out[mine, _columns(shard)] = _host(shard.read_rows(ids[mine] - shard.first_row))
        return out

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, which each call it; it may be the argument itself, changed in place."""
        return sum_over_ranks_(values.contiguous().view(-1), self.group, self.device).view(values.shape)

    def _own_columns(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` with zeros for the columns that other ranks have."""
        rows = torch.zeros(stop - start, self.embedding_dim)
        for shard in self.shards:
            low, high = max(start, shard.first_row), min(stop, shard.first_row + shard.rows)
            if low < high:
                read = shard.read(low - shard.first_row, high - shard.first_row)
                rows[low - start : high - start, _columns(shard)] = _host(read)
        return rows


def owned_rows(collection: Collection) -> dict[str, OwnedShards]:
    """The rows of each table of a collection, plain, sharded in any way or cached; nothing is copied.

    Raises:
        ValueError: naming the table, if its rows are in a form that cannot be read.
    """
    if isinstance(collection, ShardedEmbeddingBagCollection):
        return _of_sharded(collection)
    return {
        config.name: OwnedShards(
            config.num_embeddings,
            config.embedding_dim,
            [TensorShard(config.name, 0, 0, collection.embedding_bags[config.name].weight.detach())],
        )
        for config in collection.embedding_bag_configs()
    }


def _of_sharded(collection: ShardedEmbeddingBagCollection) -> dict[str, OwnedShards]:
    group, device = group_of_sharded(collection), device_of_sharded(collection)
    for tbe in tbes_of_sharded(collection):
        if isinstance(tbe, SplitTableBatchedEmbeddingBagsCodegen):
            tbe.flush()  # rows that FBGEMM caches on the device
    configs = {config.name: config for config in tables_of_sharded(collection)}
    sharding = {table: plan.sharding_type for table, plan in collection.module_sharding_plan.items()}
    shards: dict[str, list[RowShard]] = {table: [] for table in configs}
    for shard in _local_shards(collection, configs):
        replicated = sharding[shard.name] == ShardingType.DATA_PARALLEL.value
        shards[shard.name].append(_own_part(shard, group) if replicated else shard)
    return {
        table: OwnedShards(
            config.num_embeddings,
            config.embedding_dim,
            shards[table],
            sharding[table] in _COLUMNS_SPLIT,
            group,
            device,
        )
        for table, config in configs.items()
    }


def _local_shards(
    collection: ShardedEmbeddingBagCollection, configs: dict[str, EmbeddingBagConfig]
) -> Iterator[RowShard]:
    """This rank's shards; of a data-parallel table all of it."""
    if isinstance(collection, ShardedMPEEmbeddingBagCollection):
        yield from collection.shards()
        return
    state = collection.state_dict()
    for table in configs:
        weight = state[f"embedding_bags.{table}.weight"]
        if isinstance(weight, ShardedTensor):
            for shard in weight.local_shards():
                row, column = shard.metadata.shard_offsets
                yield TensorShard(table, row, column, shard.tensor.detach())
        elif type(weight) in (Tensor, torch.nn.Parameter):
            yield TensorShard(table, 0, 0, weight.detach())
        else:
            raise ValueError(f"table {table}: its rows are a {type(weight).__name__}, which cannot be read row by row")


def _own_part(shard: RowShard, group: dist.ProcessGroup | None) -> RowShard:
    """An equal part of the rows that every rank has."""
    assert isinstance(shard, TensorShard)
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    first, stop = rank * shard.rows // ranks, (rank + 1) * shard.rows // ranks
    return TensorShard(shard.name, first, 0, shard.values[first:stop])


def _columns(shard: RowShard) -> slice:
    return slice(shard.first_column, shard.first_column + shard.columns)


def _host(rows: Tensor) -> Tensor:
    return rows.detach().to("cpu", torch.float32)
