"""TorchRec's EmbeddingBagCollection with learned bit-widths."""

import enum
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    get_embedding_names_by_table,
    process_pooled_embeddings,
    reorder_inverse_indices,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from torchrec_mpe.modules.check_ids import check_ids, rows_of_features
from torchrec_mpe.modules.row_quantizer import (
    FLOATS,
    RetrainQuantizer,
    RowQuantizer,
    SearchQuantizer,
    trained_in_float32,
)
from torchrec_mpe.modules.search_config import SearchConfig
from torchrec_mpe.ops.bags import MEAN, SUM, Bags
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.precision.counts_of_table import counts_of_table
from torchrec_mpe.precision.groups import FeatureGroups, equal_groups, log_rank_groups
from torchrec_mpe.precision.row_initialization import RowInitialization
from torchrec_mpe.upstream.eager_quantization import MayRefuseQuantization
from torchrec_mpe.upstream.embedding_bag_collection import set_device
from torchrec_mpe.upstream.modules import is_root_of_trace, is_traced
from torchrec_mpe.upstream.optimizers import optimizer_in_backward

# 12 groups a table: with 32 most groups see too few lookups in an epoch for the search to tell them from noise.
_DEFAULT_GROUPS = {"log_rank": 12, "paper": 128}


class Phase(enum.Enum):
    """What the rows of a collection go through before they are pooled."""

    PLAIN = "plain"  # nothing: TorchRec's own collection
    SEARCH = "search"  # expectation over the candidate bit-widths
    RETRAIN = "retrain"  # one fixed bit-width per row


class MPEEmbeddingBagCollection(MayRefuseQuantization, EmbeddingBagCollection):
    """An EmbeddingBagCollection whose rows can be trained at mixed, learned bit-widths.

    Until :func:`torchrec_mpe.prepare_search_` or :func:`torchrec_mpe.prepare_retrain_` is called it is TorchRec's
    EmbeddingBagCollection: same arguments, same KeyedJaggedTensor in, same KeyedTensor out, same state dict keys
    (``embedding_bags.<table>.weight``), so that its checkpoints load. A phase adds one quantizer per embedding
    dimension under ``mpe.dim_<D>`` and puts the rows through it before pooling.

    Args:
        tables (List[EmbeddingBagConfig]): the tables; sum and mean pooling.
        is_weighted (bool): whether input KeyedJaggedTensors carry per-sample weights; not with mean pooling, once a
            phase is prepared.
        device (Optional[torch.device]): device of the rows; "meta" to let the sharder allocate them.

    Raises:
        ValueError: if there is no table.

    Example::

        tables = [EmbeddingBagConfig(name="t1", num_embeddings=1000, embedding_dim=8, feature_names=["f1"])]
        model = MPEEmbeddingBagCollection(tables)
        counts = FrequencyCounter(tables)                  # counts.update(kjt) over the training data
        prepare_search_(model, counts, SearchConfig())

        #        i = 0     i = 1    i = 2  <-- batch indices
        # "f1"   [0, 1]    None     [2]
        kjt = KeyedJaggedTensor.from_lengths_sync(["f1"], torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1]))
        model(kjt)["f1"]                                   # [3, 8], expectation over 0 to 6 bits
    """

    def __init__(
        self, tables: list[EmbeddingBagConfig], is_weighted: bool = False, device: torch.device | None = None
    ) -> None:
        if not tables:
            raise ValueError("a collection without tables has nothing to look up: leave it out of the model")
        super().__init__(tables=tables, is_weighted=is_weighted, device=device)
        self.phase = Phase.PLAIN
        self.row_initialization: RowInitialization | None = None
        self._row_maps: dict[int, Tensor] = {}  # by embedding dimension

    @classmethod
    def from_plain(cls, module: EmbeddingBagCollection) -> "MPEEmbeddingBagCollection":
        """A collection that shares the rows of a plain one."""
        collection = cls(module.embedding_bag_configs(), module.is_weighted(), torch.device("meta"))
        collection.embedding_bags = module.embedding_bags
        set_device(collection, module.device)
        collection.train(module.training)
        return collection

    def search_quantizers(self, counts: Mapping[str, Tensor], config: SearchConfig) -> dict[int, RowQuantizer]:
        """Quantizers by embedding dimension for :meth:`enter`, with uniform probabilities.

        Args:
            counts (Mapping[str, Tensor]): per table, int64 [num_embeddings] lookups in the training data.
            config (SearchConfig): settings.

        Raises:
            ValueError: weighted mean pooling, a data type other than FP32, or counts that are none: see
                :func:`torchrec_mpe.precision.counts_of_table.counts_of_table`.
            KeyError: no counts for a table.
        """
        self._refuse_unsupported()
        for table in self.embedding_bag_configs():
            counts_of_table(counts, table)  # before the first quantizer is made
        quantizers: dict[int, RowQuantizer] = {}
        for dim, tables in _tables_by_dim(self.embedding_bag_configs()).items():
            quantizers[dim] = SearchQuantizer(
                _groups({t.name: counts[t.name].cpu() for t in tables}, config),
                {t.name: t.num_embeddings for t in tables},
                dim,
                config,
                self.device,
            )
        return quantizers

    def retrain_quantizers(
        self,
        widths: Mapping[str, TableBitWidths],
        candidate_bits: Iterable[int],
        initialization: RowInitialization,
        learn_zero_row: bool,
    ) -> dict[int, RowQuantizer]:
        """Quantizers by embedding dimension for :meth:`enter`, with fixed bit-widths.

        They take over step sizes, offset and 0-bit vectors of the present phase.

        Raises:
            ValueError: weighted mean pooling, a data type other than FP32, or widths of another shape.
            KeyError: no widths for a table.
        """
        self._refuse_unsupported()
        return build_retrain_quantizers(
            self.embedding_bag_configs(),
            widths,
            tuple(candidate_bits),
            initialization,
            learn_zero_row,
            self.quantizers(),
            self.device,
        )

    def enter(self, phase: Phase, quantizers: Mapping[int, RowQuantizer], initialization: RowInitialization) -> None:
        """Enter the search or retrain phase, rows at their initial values."""
        self._row_maps = {}
        self._rows_of_features = rows_of_features(self.embedding_bag_configs())
        self.mpe = nn.ModuleDict({f"dim_{dim}": quantizer for dim, quantizer in quantizers.items()})
        self.phase = phase
        self.row_initialization = initialization
        # Set here, not on the class: the plain phase keeps TorchRec's own forward, which TorchScript can compile.
        self.forward = self.quantized_forward
        self.reset_rows(initialization)

    def reset_rows(self, initialization: RowInitialization) -> None:
        """Write every row's initial value."""
        for table in self.embedding_bag_configs():
            initialization.fill_(self.embedding_bags[table.name].weight.data, table.name)

    def reset_parameters(self) -> None:
        """TorchRec's initialization, or a prepared phase's initial rows; quantizers keep their values."""
        initialization = getattr(self, "row_initialization", None)
        if initialization is None:
            super().reset_parameters()
        else:
            self.reset_rows(initialization)

    def quantizers(self) -> dict[int, RowQuantizer]:
        """The quantizers by embedding dimension; empty in the plain phase."""
        modules = self.mpe.values() if self.phase is not Phase.PLAIN else ()
        return {q.embedding_dim: q for q in modules if isinstance(q, RowQuantizer)}

    def quantized_forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up, quantize and pool: ``forward`` in a prepared phase.

        Args:
            features (KeyedJaggedTensor): bags of row ids, int32 or int64, for at least the tables' features.

        Returns:
            KeyedTensor: [B, sum of the features' embedding dimensions], float32.

        Raises:
            IndexError: naming table and feature, for an id that is no row.
            TypeError: if torch.fx traces it, other than as a leaf.
            ValueError: if quantizers have an optimizer in backward, which would train them as if they were rows.
        """
        if is_traced(features):
            raise TypeError(self._traced())
        self._refuse_optimizers_in_backward()
        features = check_ids(maybe_td_to_kjt(features, None), self._rows_of_features)
        # Not KeyedJaggedTensor.to_dict, which fails on an empty batch.
        number = {key: k for k, key in enumerate(features.keys())}
        ids_per_key, bags_per_key = features.length_per_key(), features.stride_per_key()
        ids = features.values().split(ids_per_key)
        lengths = features.lengths().split(bags_per_key)
        weights = features.weights().split(ids_per_key) if self.is_weighted() else None
        pooled: dict[tuple[int, int], Tensor] = {}
        for dim, quantizer in self.quantizers().items():
            rows_before = itertools.accumulate(quantizer.num_embeddings.values(), initial=0)
            first_row = dict(zip(quantizer.num_embeddings, rows_before, strict=False))
            lookups = [
                (t, f, table, number[feature])
                for t, table in enumerate(self.embedding_bag_configs())
                if table.embedding_dim == dim
                for f, feature in enumerate(table.feature_names)
            ]
            keys = [k for *_, k in lookups]
            tables = [table for _, _, table, _ in lookups]
            bags = Bags(
                ids=torch.cat([ids[k] for k in keys]),
                offsets=torch.ops.fbgemm.asynchronous_complete_cumsum(torch.cat([lengths[k] for k in keys])),
                bags_per_feature=[bags_per_key[k] for k in keys],
                first_row=[first_row[t.name] for t in tables],
                num_rows=[t.num_embeddings for t in tables],
                table=[quantizer.table_number[t.name] for t in tables],
                pooling_mode=[MEAN if t.pooling == PoolingType.MEAN else SUM for t in tables],
                per_sample_weights=None if weights is None else torch.cat([weights[k] for k in keys]),
            )
            rows = torch.cat([F.embedding(ids[k], self.embedding_bags[t.name].weight) for _, _, t, k in lookups])
            stacked: Tensor = quantizer(rows, bags, self._row_map(quantizer))
            parts = stacked.split(list(bags.bags_per_feature))
            pooled.update({(t, f): part for (t, f, _, _), part in zip(lookups, parts, strict=True)})
        tables = self.embedding_bag_configs()
        inverse_indices = reorder_inverse_indices(
            features.inverse_indices_or_none(), [name for table in tables for name in table.feature_names]
        )
        ordered = [pooled[t, f].float() for t, table in enumerate(tables) for f in range(len(table.feature_names))]
        return KeyedTensor(
            keys=[name for names in get_embedding_names_by_table(tables) for name in names],
            values=process_pooled_embeddings(ordered, inverse_indices),
            length_per_key=[table.embedding_dim for table in tables for _ in table.feature_names],
        )

    def _row_map(self, quantizer: RowQuantizer) -> Tensor:
        """What each row of the quantizer's tables belongs to, made at the first lookup: a sharded model needs none.

        No buffer: one that came into being in forward would be missing in copies that were made before.
        """
        dim, device = quantizer.embedding_dim, quantizer.beta.device
        if dim not in self._row_maps or self._row_maps[dim].device != device:
            self._row_maps[dim] = torch.cat([quantizer.row_map(table) for table in quantizer.num_embeddings]).to(device)
        return self._row_maps[dim]

    def _refuse_optimizers_in_backward(self) -> None:
        for dim, quantizer in self.quantizers().items():
            if any(optimizer_in_backward(parameter) for parameter in quantizer.parameters()):
                raise ValueError(
                    f"apply_optimizer_in_backward was given the quantizers of dimension {dim} (mpe.dim_{dim}) with the "
                    "rows: give it embedding_bags.parameters() of the collection, or call it before the collection is "
                    "prepared; a sharded collection minds neither"
                )

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """torch's; refused in a prepared phase where torch.fx is about to trace TorchRec's forward in place of ours."""
        if is_root_of_trace(memo) and self.phase is not Phase.PLAIN:
            raise TypeError(self._traced())
        return super().named_modules(memo, prefix, remove_duplicate)  # type: ignore[no-any-return]

    def _traced(self) -> str:
        tables = ", ".join(table.name for table in self.embedding_bag_configs())
        return (
            f"tables {tables}: torch.fx cannot trace a {type(self).__name__} in the {self.phase.value} phase; let the "
            "tracer's is_leaf_module take it for a leaf, or trace what emit_inference_model makes of it"
        )

    def about_to_be_quantized(self, *, passed_by: bool) -> None:
        """Warn of tables that TorchRec's ``quantize_inference_model`` passes by; refuse it in a prepared phase.

        It takes the fp32 rows, which in a prepared phase the network has never read, and knows this class only if its
        ``quantization_mapping`` names it.

        Raises:
            ValueError: naming the tables, in the search or retrain phase.
        """
        tables = ", ".join(table.name for table in self.embedding_bag_configs())
        if passed_by:
            warnings.warn(
                f"quantization passes tables {tables} of a {type(self).__name__} by, they stay float32: pack them "
                "with compress or emit_inference_model, or name the class in quantize_inference_model's "
                "quantization_mapping",
                stacklevel=3,
            )
        elif self.phase is not Phase.PLAIN:
            raise ValueError(
                f"tables {tables} are in the {self.phase.value} phase, whose rows have bit-widths of their own: pack "
                "them with emit_inference_model"
            )

    def _refuse_unsupported(self) -> None:
        for table in self.embedding_bag_configs():
            if self.is_weighted() and table.pooling == PoolingType.MEAN:
                raise ValueError(
                    f"table {table.name} (features {', '.join(table.feature_names)}) has mean pooling in a weighted "
                    "collection: TorchRec divides by the count or by the weights' sum depending on the sharding; use "
                    "sum pooling with weights already divided"
                )
            if table.data_type != DataType.FP32:
                raise ValueError(
                    f"table {table.name} has data type {table.data_type.value}: rows are trained in FP32 and packed "
                    "to their bit-widths afterwards"
                )
            if (dtype := self.embedding_bags[table.name].weight.dtype) not in FLOATS:
                raise ValueError(f"table {table.name}: {trained_in_float32(dtype)}")


def _groups(counts: Mapping[str, Tensor], config: SearchConfig) -> FeatureGroups:
    num_groups = config.num_groups or _DEFAULT_GROUPS[config.grouping]
    return (log_rank_groups if config.grouping == "log_rank" else equal_groups)(counts, num_groups)


def _tables_by_dim(configs: Iterable[EmbeddingBagConfig]) -> dict[int, list[EmbeddingBagConfig]]:
    tables: dict[int, list[EmbeddingBagConfig]] = {}
    for table in configs:
        tables.setdefault(table.embedding_dim, []).append(table)
    return tables


def build_retrain_quantizers(
    configs: Iterable[EmbeddingBagConfig],
    widths: Mapping[str, TableBitWidths],
    candidate_bits: tuple[int, ...],
    initialization: RowInitialization,
    learn_zero_row: bool,
    previous: Mapping[int, RowQuantizer],
    device: torch.device | None,
) -> dict[int, RowQuantizer]:
    """Quantizers with fixed bit-widths for a collection's tables, plain or sharded, by embedding dimension.

    Step sizes, offset and 0-bit vectors are taken over from ``previous``.

    Raises:
        KeyError: if a table has no bit-widths.
        ValueError: if a table's bit-widths are of another shape.
    """
    quantizers: dict[int, RowQuantizer] = {}
    for dim, tables in _tables_by_dim(configs).items():
        selected = {t.name: _widths_of(t, widths) for t in tables}
        quantizer = RetrainQuantizer(selected, dim, candidate_bits, initialization, learn_zero_row, device)
        if dim in previous:
            quantizer.load_from(previous[dim])
        quantizers[dim] = quantizer
    return quantizers


def _widths_of(table: EmbeddingBagConfig, widths: Mapping[str, TableBitWidths]) -> TableBitWidths:
    if table.name not in widths:
        raise KeyError(f"the precision plan has no bit-widths for table {table.name}")
    found = widths[table.name]
    if (found.num_embeddings, found.embedding_dim) != (table.num_embeddings, table.embedding_dim):
        raise ValueError(
            f"table {table.name} is {table.num_embeddings} x {table.embedding_dim}, in the precision plan it is "
            f"{found.num_embeddings} x {found.embedding_dim}"
        )
    return found
