"""EmbeddingBagCollection over packed rows, for inference."""

from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    get_embedding_names_by_table,
    process_pooled_embeddings,
    reorder_inverse_indices,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_mpe.ops import packed_embedding_bag
from torchrec_mpe.packing import PackedTables, SizeReport, size_report


class PackedEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """Pooled embeddings from rows packed to 0 to 8 bits each, all widths mixed in one table.

    Takes and returns what TorchRec's EmbeddingBagCollection does. Its buffers are all it stores: the packed rows, the
    row directories and the scales, as :class:`~torchrec_mpe.packing.PackedTables` describes them.

    Args:
        packed (PackedTables): the tables, in the order of ``tables``.
        tables (List[EmbeddingBagConfig]): their configs; sum and mean pooling.
        is_weighted (bool): whether input KeyedJaggedTensors carry per-sample weights.
        output_dtype (torch.dtype): float32, float16 or bfloat16.

    Raises:
        ValueError: if tables and configs do not fit, or a weighted collection has mean pooling.

    Example::

        collection = PackedEmbeddingBagCollection(pack_tables([...]), ebc.embedding_bag_configs())
        collection(kjt)["f1"]             # [B, D]
        print(collection.size_report())   # every stored byte
    """

    def __init__(
        self,
        packed: PackedTables,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        output_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for table in tables:
            if is_weighted and table.pooling == PoolingType.MEAN:
                raise ValueError(f"table {table.name} has mean pooling in a weighted collection: use sum pooling")
        shapes = [(table.name, table.num_embeddings, table.embedding_dim) for table in tables]
        found = [(table.name, table.num_embeddings, table.embedding_dim) for table in packed.tables]
        if shapes != found:
            raise ValueError(f"the packed tables are {found}, the configs {shapes}")
        self._shapes = packed.tables
        self._embedding_bag_configs = tables
        self._is_weighted = is_weighted
        self.output_dtype = output_dtype
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor)
        self._embedding_names: list[str] = [name for names in get_embedding_names_by_table(tables) for name in names]
        self._lengths_per_embedding = [t.embedding_dim for t in tables for _ in t.feature_names]
        # One call of the op for each pooling mode, features in the order of the tables.
        self._calls: list[tuple[bool, list[int], list[str], list[int]]] = []
        flat = [(t, f, table.pooling) for t, table in enumerate(tables) for f in table.feature_names]
        for pooling in (PoolingType.SUM, PoolingType.MEAN):
            places = [k for k, (_, _, p) in enumerate(flat) if p == pooling]
            if places:
                names, maps = [flat[k][1] for k in places], [flat[k][0] for k in places]
                self._calls.append((pooling == PoolingType.MEAN, places, names, maps))

    @property
    def packed_tables(self) -> PackedTables:
        """The buffers as PackedTables, sharing memory."""
        names = (name for name, _ in self.named_buffers(recurse=False))
        return PackedTables(tables=self._shapes, **{name: getattr(self, name) for name in names})

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool.

        Args:
            features (KeyedJaggedTensor): bags of row ids, int32 or int64, for at least the tables' features.

        Returns:
            KeyedTensor: [B, sum of the features' embedding dimensions], ``output_dtype``.

        Raises:
            IndexError: naming the table, if an id is out of range.
            KeyError: if a feature is missing.
        """
        number = {key: k for k, key in enumerate(features.keys())}
        ids_per_key, bags_per_key = features.length_per_key(), features.stride_per_key()
        ids = features.values().split(ids_per_key)
        lengths = features.lengths().split(bags_per_key)
        weights = features.weights().split(ids_per_key) if self._is_weighted else None
        packed = self.packed_tables
        pooled: dict[int, Tensor] = {}
        for mean, places, names, maps in self._calls:
            if missing := [name for name in names if name not in number]:
                raise KeyError(f"the KeyedJaggedTensor lacks features {', '.join(missing)}; it has {list(number)}")
            # Features of one batch size go together: with variable batch sizes there are several.
            sizes = {bags_per_key[number[name]] for name in names}
            for size in sorted(sizes):
                chosen = [k for k, name in enumerate(names) if bags_per_key[number[name]] == size]
                keys = [number[names[k]] for k in chosen]
                flat_lengths = torch.cat([lengths[k] for k in keys])
                offsets = torch.zeros(flat_lengths.numel() + 1, dtype=torch.int64, device=flat_lengths.device)
                torch.cumsum(flat_lengths, 0, out=offsets[1:])
                out = packed_embedding_bag(
                    packed,
                    [maps[k] for k in chosen],
                    torch.cat([ids[k] for k in keys]),
                    offsets,
                    mean=mean,
                    per_sample_weights=None if weights is None else torch.cat([weights[k] for k in keys]),
                    output_dtype=self.output_dtype,
                )
                parts = out.split([self._lengths_per_embedding[places[k]] for k in chosen], dim=1)
                pooled.update({places[k]: part for k, part in zip(chosen, parts, strict=True)})
        ordered = [pooled[k] for k in range(len(self._embedding_names))]
        inverse_indices = reorder_inverse_indices(
            features.inverse_indices_or_none(), [f for table in self._embedding_bag_configs for f in table.feature_names]
        )
        return KeyedTensor(
            keys=self._embedding_names,
            values=process_pooled_embeddings(ordered, inverse_indices),
            length_per_key=self._lengths_per_embedding,
        )

    def size_report(self) -> SizeReport:
        """Bytes by kind and table; the total is the bytes of this module's buffers."""
        return size_report(self.packed_tables)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The table configs, with their logical shapes."""
        return self._embedding_bag_configs

    def is_weighted(self) -> bool:
        """Whether input KeyedJaggedTensors carry per-sample weights."""
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        device: torch.device = self.get_buffer("payload").device
        return device

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedEmbeddingBagCollection":
        """Moves buffers between devices; ``half()`` and the like leave them: scales are part of the stored format."""
        dtypes = {name: buffer.dtype for name, buffer in self.named_buffers(recurse=False)}
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self.get_buffer(name)
            if after.dtype != dtypes[name]:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        return f"\n{self.size_report()}\n"
