"""Packed tables as a TorchRec module."""

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    get_embedding_names_by_table,
    process_pooled_embeddings,
    reorder_inverse_indices,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_mpe.coding.code_tables import TableSummary
from torchrec_mpe.inference.fbgemm_embedding_bags import FbgemmTableBatchedEmbeddingBags
from torchrec_mpe.inference.packed_table_batched_embedding_bags import PackedTableBatchedEmbeddingBags
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.check_bags import OUTPUT_DTYPES
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.size import SizeReport
from torchrec_mpe.packing.update import TableRows, UpdatedRows

_POOLING_MODES = {PoolingType.SUM: 0, PoolingType.MEAN: 1}


class PackedEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """An EmbeddingBagCollection for inference whose rows take exactly their bits.

    Same input, output keys, order and shapes as ``torchrec.modules.embedding_modules.EmbeddingBagCollection``. The
    tables are in ``tbe``: with ``backend="packed"`` a :class:`PackedTableBatchedEmbeddingBags`, rows at exactly their
    bits; with ``backend="fbgemm"`` a :class:`FbgemmTableBatchedEmbeddingBags`, rows widened to INT2, INT4 and INT8 for
    hosts that have FBGEMM but not this library's operators, larger and equal within float16's rounding of the step
    sizes; rows of coded tables are decoded and quantized to INT8 there, a quarter of fp32's bytes. All state is in its
    buffers: no parameters, no gradients; ``.half()`` and friends leave them as they are (choose the output's dtype with
    ``output_dtype``). A state_dict loads into a collection of the same tables, widths and backend, and is checked.

    Args:
        tables (list[EmbeddingBagConfig]): configs with pooling SUM or MEAN, in output order.
        packed (PackedTables): the same tables, in any order.
        is_weighted (bool): whether features carry per-sample weights.
        output_dtype (torch.dtype): float32, float16 or bfloat16, computed in float32; with "packed" also float64.
        device (Optional[torch.device]): where the buffers go; None: they stay.
        backend (str): "packed" or "fbgemm".
        bounds_check_mode (int): what becomes of ids that are no rows of their table, FBGEMM's BoundsCheckMode; FATAL by
            default.
        coded_rows (SparseType): with "fbgemm", the format of rows of coded tables, INT8, INT4 or INT2.
        encoders (Optional[Mapping[str, Tensor]]): float32 [D, K] by coded table, which :meth:`apply_update` needs and
            no lookup: an attribute, in no buffer, state_dict or size; an artifact holds them.

    Attributes:
        summaries (dict[str, TableSummary]): by coded table what ``compress`` made of it, where it was in this process.

    Raises:
        ValueError: naming the table, if configs and packed tables differ, a table has another pooling type, or a
            weighted table has MEAN pooling; or if there is no such backend or dtype.

    Example::

        >>> packed = pack_tables([TableToPack("t1", widths, lambda start, stop: weight[start:stop], alpha, beta)])
        >>> config = EmbeddingBagConfig(name="t1", embedding_dim=16, num_embeddings=1000, feature_names=["f1"])
        >>> ebc = PackedEmbeddingBagCollection([config], packed)
        >>> ebc(KeyedJaggedTensor.from_lengths_sync(["f1"], torch.tensor([3, 7]), torch.tensor([2, 0])))["f1"].shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        packed: PackedTables,
        is_weighted: bool = False,
        output_dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        backend: str = "packed",
        bounds_check_mode: int = BoundsCheckMode.FATAL,
        coded_rows: SparseType = SparseType.INT8,
        encoders: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if output_dtype not in OUTPUT_DTYPES:
            raise ValueError(f"output_dtype must be one of {OUTPUT_DTYPES}, got {output_dtype}")
        self._configs = copy.deepcopy(tables)
        self._is_weighted = is_weighted
        self._output_dtype = output_dtype
        self._backend = backend
        self.encoders: dict[str, Tensor] = dict(encoders or {})
        self.summaries: dict[str, TableSummary] = {}
        table_index = _match_tables(self._configs, packed, is_weighted)
        self._feature_names: list[str] = []
        self._feature_labels: list[str] = []
        self._lengths_per_embedding: list[int] = []
        feature_table_map: list[int] = []
        pooling_mode: list[int] = []
        for config in self._configs:
            config.feature_names = config.feature_names or [config.name]
            for feature in config.feature_names:
                self._feature_names.append(feature)
                self._feature_labels.append(f"table {config.name}, feature {feature}")
                self._lengths_per_embedding.append(config.embedding_dim)
                feature_table_map.append(table_index[config.name])
                pooling_mode.append(_POOLING_MODES[config.pooling])
        self._embedding_names: list[str] = [
            name for names in get_embedding_names_by_table(self._configs) for name in names
        ]
        if backend not in ("packed", "fbgemm"):
            raise ValueError(f"there is no backend {backend}: choose packed or fbgemm")
        storage: Callable[..., PackedTableBatchedEmbeddingBags | FbgemmTableBatchedEmbeddingBags] = (
            PackedTableBatchedEmbeddingBags
            if backend == "packed"
            else partial(FbgemmTableBatchedEmbeddingBags, coded_rows=coded_rows)
        )
        self.tbe: PackedTableBatchedEmbeddingBags | FbgemmTableBatchedEmbeddingBags = storage(
            packed,
            feature_table_map,
            pooling_mode,
            output_dtype=output_dtype,
            bounds_check_mode=bounds_check_mode,
            feature_labels=self._feature_labels,
            device=device,
        )

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
            pooled = self.tbe(features.values(), features.offsets(), weights)
            if inverse_indices is not None:
                pooled = process_pooled_embeddings(
                    list(pooled.split(self._lengths_per_embedding, dim=1)),
                    reorder_inverse_indices(inverse_indices, self._feature_names),
                )
        return KeyedTensor(keys=self._embedding_names, length_per_key=self._lengths_per_embedding, values=pooled)

    def _pool_each(self, features: KeyedJaggedTensor, weights: Tensor | None) -> list[Tensor]:
        """One tensor a feature, each with its own batch size."""
        if not isinstance(self.tbe, PackedTableBatchedEmbeddingBags):
            raise NotImplementedError(
                f"features {', '.join(self._feature_names)} vary in batch size: the fbgemm backend takes one for all; "
                "use the packed backend"
            )
        offsets, ids = features.offsets(), features.offset_per_key()
        pooled: list[Tensor] = []
        bag = 0
        for f, batch in enumerate(features.stride_per_key()):
            span = slice(ids[f], ids[f + 1])
            pooled.append(
                self.tbe.lookup(
                    slice(f, f + 1),
                    features.values()[span],
                    offsets[bag : bag + batch + 1] - ids[f],
                    None if weights is None else weights[span],
                )
            )
            bag += batch
        return pooled

    def apply_update(self, rows: Mapping[str, TableRows]) -> dict[str, UpdatedRows]:
        """Give rows new values in place while others look up, see :meth:`PackedTableBatchedEmbeddingBags.apply_update`.

        Rows of coded tables need the table's encoder, which collections that ``compress`` makes have, and those that
        ``load`` reads from an artifact that was saved with encoders.

        Raises:
            TypeError: with the fbgemm backend, whose rows cannot be updated.
        """
        if not isinstance(self.tbe, PackedTableBatchedEmbeddingBags):
            raise TypeError(
                f"the collection of tables {', '.join(c.name for c in self._configs)} stores FBGEMM's INT2, INT4 and "
                "INT8 rows, which cannot be updated: update the packed collection that it was made from, and convert "
                "that again"
            )
        return self.tbe.apply_update(rows, self.encoders)

    def packed_tables(self) -> PackedTables:
        """The packed tensors, not copied.

        Raises:
            TypeError: with the fbgemm backend, which does not keep them.
        """
        return self._packed_storage().packed_tables()

    def size_report(self) -> SizeReport:
        """Bytes of every buffer by kind, per table and overall; raises as :meth:`packed_tables`."""
        return self._packed_storage().size_report()

    def _packed_storage(self) -> PackedTableBatchedEmbeddingBags:
        if not isinstance(self.tbe, PackedTableBatchedEmbeddingBags):
            raise TypeError(
                f"the collection of tables {', '.join(c.name for c in self._configs)} stores FBGEMM's INT2, INT4 and "
                "INT8 rows, not packed ones: take those from the collection that it was made from"
            )
        return self.tbe

    @property
    def nbytes(self) -> int:
        """Bytes of the tables as stored."""
        return self.tbe.nbytes

    def on_fbgemm(self, coded_rows: SparseType = SparseType.INT8) -> "PackedEmbeddingBagCollection":
        """The same collection with ``backend="fbgemm"``; raises as :meth:`packed_tables`.

        Args:
            coded_rows (SparseType): the format of rows of coded tables, INT8, INT4 or INT2.
        """
        packed = self._packed_storage()
        return PackedEmbeddingBagCollection(
            self._configs,
            packed.packed_tables(),
            self._is_weighted,
            self._output_dtype,
            packed.device,
            "fbgemm",
            packed.bounds_check_mode,
            coded_rows,
        )

    def backend(self) -> str:
        """How the tables are stored: "packed" or "fbgemm"."""
        return self._backend

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
        device: torch.device = next(self.buffers()).device
        return device


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
