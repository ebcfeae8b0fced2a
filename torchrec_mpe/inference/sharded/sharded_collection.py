"""A packed collection spread over devices, as a TorchRec module."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    process_pooled_embeddings,
    reorder_inverse_indices,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_mpe.distributed.planner.packed_placement import PackedShard
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.inference.packed_table_batched_embedding_bags import PackedTableBatchedEmbeddingBags
from torchrec_mpe.inference.sharded.row_ranges import RowRange
from torchrec_mpe.inference.sharded.sharded_tbe import ShardedPackedTableBatchedEmbeddingBags

LEAF_MODULES = ["ShardedPackedTableBatchedEmbeddingBags"]
"""What ``torchrec.fx.Tracer(leaf_modules=...)`` needs to trace models with sharded packed collections."""


class ShardedPackedEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """A :class:`PackedEmbeddingBagCollection` whose tables, or ranges of rows, lie on several devices of one process.

    Same input, output keys, order, shapes and dtype as the unsharded collection. :func:`shard_packed` and
    :class:`PackedEmbeddingBagCollectionSharder` make it and verify its values.

    Moving the model it is part of, by ``.to(device)``, leaves its tables where they are. ``torchrec.fx.Tracer`` traces
    it with :data:`LEAF_MODULES`, and ``torch.jit.script`` compiles it, traced or not; then a batch with inverse
    indices, deduplicated or of varying size, is an error.

    Args:
        collection (PackedEmbeddingBagCollection): with the "packed" backend; stays as it is.
        shards (Sequence[PackedShard]): of its tables, together every row of every table once.
        devices (Sequence[torch.device]): by the shards' ``device``.
        output_device (torch.device): where the pooled embeddings go.

    Raises:
        TypeError: if the collection has the fbgemm backend.
        ValueError: naming the table, if shards leave out rows, hold rows twice or are on a device that is not there.
    """

    def __init__(
        self,
        collection: PackedEmbeddingBagCollection,
        shards: Sequence[PackedShard],
        devices: Sequence[torch.device],
        output_device: torch.device,
    ) -> None:
        super().__init__()
        packed = collection.packed_tables()
        assert isinstance(collection.tbe, PackedTableBatchedEmbeddingBags)
        self._configs: list[EmbeddingBagConfig] = copy.deepcopy(collection.embedding_bag_configs())
        self._is_weighted = collection.is_weighted()
        self._feature_names = [feature for config in self._configs for feature in config.feature_names]
        self._feature_labels = list(collection._feature_labels)
        self._embedding_names = list(collection._embedding_names)
        self._lengths_per_embedding = list(collection._lengths_per_embedding)
        self.shards = tuple(shards)
        index = {table.name: t for t, table in enumerate(packed.tables)}
        check_shards({table.name: table.num_embeddings for table in packed.tables}, self.shards, len(devices))
        ranges: dict[int, list[RowRange]] = {}
        # In the order of the tables: a device that holds all of them shares the unsharded tensors.
        for shard in sorted(self.shards, key=lambda s: (index[s.table], s.first_row)):
            ranges.setdefault(shard.device, []).append(RowRange(index[shard.table], shard.first_row, shard.num_rows))
        self.tbe = ShardedPackedTableBatchedEmbeddingBags(collection.tbe, ranges, devices, output_device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool; arguments and errors as those of :meth:`PackedEmbeddingBagCollection.forward`."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            traced = isinstance(features, torch.fx.Proxy)
            if not traced and (features.variable_stride_per_key() or features.inverse_indices_or_none() is not None):
                return self._with_inverse_indices(features)
        ordered = _in_order(features, self._feature_names, self._feature_labels, self._is_weighted)
        weights = ordered.weights() if self._is_weighted else None
        return KeyedTensor(
            keys=self._embedding_names,
            length_per_key=self._lengths_per_embedding,
            values=self.tbe(ordered.values(), ordered.offsets(), weights),
        )

    @torch.jit.unused
    def _with_inverse_indices(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """A deduplicated batch: pooled as features of one batch size, those with fewer bags padded, then expanded."""
        inverse_indices = features.inverse_indices_or_none()
        if inverse_indices is None:
            raise ValueError("features of varying batch size need inverse indices")
        ordered = _select(features, self._feature_names, self._feature_labels)
        weights = _weights(ordered) if self._is_weighted else None
        strides = ordered.stride_per_key()
        lengths = torch.zeros((len(strides), max(strides)), dtype=ordered.lengths().dtype, device=ordered.device())
        for padded, own in zip(lengths, ordered.lengths().split(strides), strict=True):
            padded[: len(own)] = own
        offsets: Tensor = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.flatten())
        pooled = self.tbe(ordered.values(), offsets, weights).split(self._lengths_per_embedding, dim=1)
        names, inverse = inverse_indices
        values = process_pooled_embeddings(
            [each[:bags].contiguous() for each, bags in zip(pooled, strides, strict=True)],
            reorder_inverse_indices((names, inverse.to(self.tbe.output_device)), self._feature_names),
        )
        return KeyedTensor(keys=self._embedding_names, length_per_key=self._lengths_per_embedding, values=values)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables' configs, in output order."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether features carry per-sample weights."""
        return self._is_weighted

    def output_dtype(self) -> torch.dtype:
        """The dtype of the output."""
        return self.tbe.output_dtype

    @property
    def device_bytes(self) -> dict[int, int]:
        """Bytes of the tables on each device in use, by the device's index."""
        return self.tbe.device_bytes

    __jit_unused_properties__ = ("device_bytes",)


def check_shards(tables: dict[str, int], shards: Sequence[PackedShard], devices: int) -> None:
    """Check that shards hold every row once.

    Args:
        tables (dict[str, int]): names to rows.
        shards (Sequence[PackedShard]): of these tables.
        devices (int): how many there are.

    Raises:
        ValueError: naming the table.
    """
    unknown = sorted({shard.table for shard in shards} - set(tables))
    if unknown:
        raise ValueError(f"the placement has a table {unknown[0]}; the model has {', '.join(tables)}")
    for name, rows in tables.items():
        following = 0
        for shard in sorted((s for s in shards if s.table == name), key=lambda s: s.first_row):
            if not 0 <= shard.device < devices:
                raise ValueError(f"table {name}: it is placed on device {shard.device} of {devices}")
            if shard.first_row != following or shard.num_rows < 1:
                raise ValueError(
                    f"table {name}: a shard has {shard.num_rows} rows from row {shard.first_row}, where row "
                    f"{following} is the first that no other shard has"
                )
            following += shard.num_rows
        if following != rows:
            raise ValueError(f"table {name}: the shards hold {following} of its {rows} rows")


def _weights(features: KeyedJaggedTensor) -> Tensor:
    weights: Tensor | None = features.weights_or_none()
    if weights is None:
        raise ValueError("the collection is weighted, the features carry no weights")
    return weights


def _select(features: KeyedJaggedTensor, names: list[str], labels: list[str]) -> KeyedJaggedTensor:
    """The features of these names, in this order."""
    keys = features.keys()
    if keys == names:
        return features
    order: list[int] = []
    for name, label in zip(names, labels):  # noqa: B905  (TorchScript has no strict)
        if name not in keys:
            raise KeyError(f"{label}: the features have only {keys}")
        order.append(keys.index(name))
    return features.permute(order)


# A leaf of fx, and compiled by TorchScript: the order of the batch's features is looked at when it is there.
@torch.fx.wrap
def _in_order(features: KeyedJaggedTensor, names: list[str], labels: list[str], is_weighted: bool) -> KeyedJaggedTensor:
    """The features of these names, in this order, checked."""
    if features.inverse_indices_or_none() is not None:
        raise ValueError("a traced or scripted collection takes no inverse indices: expand the batch first")
    if is_weighted and features.weights_or_none() is None:
        raise ValueError("the collection is weighted, the features carry no weights")
    return _select(features, names, labels)
