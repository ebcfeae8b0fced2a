"""Packed tables as a TorchRec module."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

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

from torchrec_mpe.ops.packed_embedding_bag import packed_embedding_bag
from torchrec_mpe.ops.reference.packed_embedding_bag import OUTPUT_DTYPES
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.size import SizeReport, size_report
from torchrec_mpe.packing.validate import validate_packed_tables

_POOLING_MODES = {PoolingType.SUM: 0, PoolingType.MEAN: 1}

Self = TypeVar("Self", bound="PackedEmbeddingBagCollection")


class PackedEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """An EmbeddingBagCollection for inference whose rows take exactly their bits.

    Same input, output keys, order and shapes as ``torchrec.modules.embedding_modules.EmbeddingBagCollection``. All
    state is in buffers, the tensors of :class:`PackedTables`: no parameters, no gradients. ``.to(device)`` moves them;
    ``.half()``, ``.float()`` and ``.to(dtype)`` leave every buffer as it is, scales stay float32 (choose the output's
    dtype with ``output_dtype``). A state_dict loads into a collection of the same widths and is checked.

    Args:
        tables (list[EmbeddingBagConfig]): configs with pooling SUM or MEAN, in output order.
        packed (PackedTables): the same tables, in any order.
        is_weighted (bool): whether features carry per-sample weights.
        output_dtype (torch.dtype): float32, float16 or bfloat16, computed in float32; or float64.
        device (Optional[torch.device]): where the buffers go; None: they stay.

    Raises:
        ValueError: naming the table, if configs and packed tables differ, a table has another pooling type, or a
            weighted table has MEAN pooling.

    Example::

        >>> packed = pack_tables([TableToPack("t1", widths, lambda start, stop: weight[start:stop], alpha, beta)])
        >>> config = EmbeddingBagConfig(name="t1", embedding_dim=16, num_embeddings=1000, feature_names=["f1"])
        >>> ebc = PackedEmbeddingBagCollection([config], packed)
        >>> ebc(KeyedJaggedTensor.from_lengths_sync(["f1"], torch.tensor([3, 7]), torch.tensor([2, 0])))["f1"].shape
        torch.Size([2, 16])
    """

    payload: Tensor

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        packed: PackedTables,
        is_weighted: bool = False,
        output_dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if output_dtype not in OUTPUT_DTYPES:
            raise ValueError(f"output_dtype must be one of {OUTPUT_DTYPES}, got {output_dtype}")
        self._configs = copy.deepcopy(tables)
        self._is_weighted = is_weighted
        self._output_dtype = output_dtype
        self._tables = packed.tables
        table_index = _match_tables(self._configs, packed, is_weighted)
        self._feature_names: list[str] = []
        self._feature_labels: list[str] = []
        self._lengths_per_embedding: list[int] = []
        self._feature_table_map: list[int] = []
        self._pooling_modes: list[int] = []
        for config in self._configs:
            config.feature_names = config.feature_names or [config.name]
            for feature in config.feature_names:
                self._feature_names.append(feature)
                self._feature_labels.append(f"table {config.name}, feature {feature}")
                self._lengths_per_embedding.append(config.embedding_dim)
                self._feature_table_map.append(table_index[config.name])
                self._pooling_modes.append(_POOLING_MODES[config.pooling])
        self._embedding_names: list[str] = [
            name for names in get_embedding_names_by_table(self._configs) for name in names
        ]
        self._D_offsets = [0]
        for length in self._lengths_per_embedding:
            self._D_offsets.append(self._D_offsets[-1] + length)
        self._buffer_names = list(packed.tensors())
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor if device is None else tensor.to(device))
        self.register_load_state_dict_post_hook(_check_loaded)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool.

        Args:
            features (KeyedJaggedTensor): ids of at least this collection's features, in any order, B bags each; a
                variable batch needs inverse indices.

        Returns:
            KeyedTensor: [B, total_D], ``output_dtype``.

        Raises:
            IndexError: naming table and feature, if an id is not a row of its table.
            KeyError: naming table and feature, if ``features`` lacks one.
            ValueError: if the collection is weighted and ``features`` is not, or batches differ without inverse
                indices.
        """
        keys = features.keys()
        if keys != self._feature_names:
            position = {key: k for k, key in enumerate(keys)}
            for feature, label in zip(self._feature_names, self._feature_labels, strict=True):
                if feature not in position:
                    raise KeyError(f"{label}: the features have only {keys}")
        inverse_indices = features.inverse_indices_or_none()
        if keys != self._feature_names:
            features = features.permute([position[feature] for feature in self._feature_names])
        weights = features.weights_or_none() if self._is_weighted else None
        if self._is_weighted and weights is None:
            raise ValueError("the collection is weighted, the features carry no weights")
        if features.variable_stride_per_key():
            if inverse_indices is None:
                raise ValueError("features of varying batch size need inverse indices")
            pooled = process_pooled_embeddings(
                self._pool_each(features, weights), reorder_inverse_indices(inverse_indices, self._feature_names)
            )
        else:
            pooled = self._pool(features.values(), features.offsets(), weights, 0, len(self._feature_names))
            if inverse_indices is not None:
                pooled = process_pooled_embeddings(
                    list(pooled.split(self._lengths_per_embedding, dim=1)),
                    reorder_inverse_indices(inverse_indices, self._feature_names),
                )
        return KeyedTensor(keys=self._embedding_names, length_per_key=self._lengths_per_embedding, values=pooled)

    def _pool(self, values: Tensor, offsets: Tensor, weights: Tensor | None, first: int, last: int) -> Tensor:
        """[B, D of features first to last - 1]."""
        column = self._D_offsets[first]
        tensors: dict[str, Any] = {name: self._buffers[name] for name in self._buffer_names}
        return packed_embedding_bag(
            **tensors,
            D_offsets=[offset - column for offset in self._D_offsets[first : last + 1]],
            feature_table_map=self._feature_table_map[first:last],
            pooling_modes=self._pooling_modes[first:last],
            indices=values,
            offsets=offsets,
            per_sample_weights=weights,
            output_dtype=self._output_dtype,
            feature_labels=self._feature_labels[first:last],
        )

    def _pool_each(self, features: KeyedJaggedTensor, weights: Tensor | None) -> list[Tensor]:
        """One tensor a feature, each with its own batch size."""
        offsets, ids = features.offsets(), features.offset_per_key()
        pooled: list[Tensor] = []
        bag = 0
        for f, batch in enumerate(features.stride_per_key()):
            span = slice(ids[f], ids[f + 1])
            pooled.append(
                self._pool(
                    features.values()[span],
                    offsets[bag : bag + batch + 1] - ids[f],
                    None if weights is None else weights[span],
                    f,
                    f + 1,
                )
            )
            bag += batch
        return pooled

    def packed_tables(self) -> PackedTables:
        """The buffers, not copied."""
        return PackedTables(self._tables, **{name: self.get_buffer(name) for name in self._buffer_names})

    def size_report(self) -> SizeReport:
        """Bytes of every buffer by kind, per table and overall."""
        return size_report(self.packed_tables())

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables' configs, in output order."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether features carry per-sample weights."""
        return self._is_weighted

    def output_dtype(self) -> torch.dtype:
        """The dtype of the output."""
        return self._output_dtype

    @property
    def device(self) -> torch.device:
        """The device of the buffers."""
        return self.payload.device

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Floating-point buffers travel as integers, so that half() and friends see nothing to convert.
        moved: dict[str, Tensor] = {}
        for name in self._buffer_names:
            buffer = self.get_buffer(name)
            bits = buffer.view(torch.int32) if buffer.is_floating_point() else buffer
            result = fn(bits)
            if result.dtype != bits.dtype:
                raise TypeError(f"buffer {name} of a packed collection cannot become {result.dtype}")
            moved[name] = result.view(buffer.dtype)
        self._buffers.update(moved)
        return self

    def extra_repr(self) -> str:
        if self.device.type == "meta":
            return ",\n".join(f"{table.name}({table.num_embeddings}, {table.embedding_dim})" for table in self._tables)
        report = self.size_report()
        lines = []
        for table in report.tables:
            widths = {bits: rows for bits, rows in enumerate(table.rows_per_width) if rows}
            lines.append(
                f"{table.name}({table.num_embeddings}, {table.embedding_dim}, rows per bit-width {widths}, "
                f"{table.total} bytes, {table.compression_ratio:.1f}x)"
            )
        return "\n".join([*lines, f"all: {report.total} bytes, {report.compression_ratio:.1f}x"])


def _match_tables(configs: list[EmbeddingBagConfig], packed: PackedTables, is_weighted: bool) -> dict[str, int]:
    """Index of each config's table among the packed tables."""
    names = [config.name for config in configs]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"table {duplicates[0]} has two configs")
    index = {table.name: t for t, table in enumerate(packed.tables)}
    if index.keys() != set(names):
        raise ValueError(f"the configs are of tables {sorted(names)}, the packed tables are {sorted(index)}")
    for config in configs:
        table = packed.tables[index[config.name]]
        if (table.num_embeddings, table.embedding_dim) != (config.num_embeddings, config.embedding_dim):
            raise ValueError(
                f"table {config.name}: the config says {config.num_embeddings} rows of {config.embedding_dim}, "
                f"packed are {table.num_embeddings} of {table.embedding_dim}"
            )
        if config.pooling not in _POOLING_MODES:
            raise ValueError(f"table {config.name}: pooling must be SUM or MEAN, got {config.pooling}")
        if is_weighted and config.pooling == PoolingType.MEAN:
            raise ValueError(f"table {config.name}: MEAN pooling takes no per-sample weights")
    return index


def _check_loaded(module: PackedEmbeddingBagCollection, _incompatible_keys: Any) -> None:
    """After load_state_dict: refuse tensors with which a lookup could leave its buffers."""
    if module.device.type != "meta":
        validate_packed_tables(module.packed_tables())
