"""The frequency order of rows, each rank of the job holding the places of its own rows."""

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_mpe.distributed.sum_over_ranks import sum_over_ranks_


class ShardedOrder(Mapping[str, Tensor | None]):
    """The place of every row in the frequency order, by table: sharded like the rows, put together when read.

    Reading a table is a collective: every rank of the group reads the same tables in the same order.

    Args:
        order (Mapping[str, Optional[Tensor]]): per table, int32 [num_embeddings]; None where ids are in it. Not kept.
        shards (Iterable[tuple[str, int, int]]): table, first row and rows of each shard of this rank whose places it is
            to hold; over all ranks they cover every row of a table once.
        group (Optional[ProcessGroup]): of the ranks; alone if None.
        device (torch.device): where the group's collectives work.
    """

    def __init__(
        self,
        order: Mapping[str, Tensor | None],
        shards: Iterable[tuple[str, int, int]],
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._num_embeddings = {table: None if whole is None else len(whole) for table, whole in order.items()}
        self._shards: dict[str, list[tuple[int, Tensor]]] = {}
        for table, first, rows in shards:
            whole = order[table]
            if whole is not None:
                self._shards.setdefault(table, []).append((first, whole[first : first + rows].cpu().clone()))
        self._group = group
        self._device = device

    @property
    def local_bytes(self) -> int:
        """Bytes that this rank holds, in host memory."""
        return sum(part.nbytes for parts in self._shards.values() for _, part in parts)

    def __getitem__(self, table: str) -> Tensor | None:
        rows = self._num_embeddings[table]
        if rows is None:
            return None
        whole = torch.zeros(rows, dtype=torch.int32)
        for first, part in self._shards.get(table, []):
            whole[first : first + len(part)] = part
        return sum_over_ranks_(whole, self._group, self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._num_embeddings)

    def __len__(self) -> int:
        return len(self._num_embeddings)
