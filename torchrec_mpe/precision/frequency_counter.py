"""How often every row of every table is looked up."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.files.document import DocumentFormat
from torchrec_mpe.files.progress import progress_bar
from torchrec_mpe.files.tensors_file import read_tensors
from torchrec_mpe.upstream.embedding_bag_collection import tables_of_sharded

_FORMAT = DocumentFormat("torchrec_mpe.frequencies", 1, "a frequency file")
_SQUARED = "squared_weights/"  # before a table's name in a file


class FrequencyCounter(Mapping[str, Tensor]):
    """Counts the lookups of every row, per table, over KeyedJaggedTensors.

    Of mean-pooled tables, and of features with weights, it also adds up the squares of the weights with which a row is
    looked up, see :attr:`squared_weights`.

    Args:
        tables (Iterable[EmbeddingBagConfig]): the tables; a feature shared by two tables is counted in both.

    Example::

        table = EmbeddingBagConfig(name="t", num_embeddings=3, embedding_dim=4, feature_names=["f"])
        counter = FrequencyCounter([table])
        counter.update(KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([2, 0, 2]), torch.tensor([1, 2])))
        counter["t"]          # tensor([1, 0, 2])
    """

    def __init__(self, tables: Iterable[EmbeddingBagConfig]) -> None:
        self._tables_of_feature: dict[str, list[str]] = {}
        self._counts: dict[str, Tensor] = {}
        self._squared: dict[str, Tensor] = {}
        self._mean_tables: set[str] = set()
        for table in tables:
            counts = torch.zeros(table.num_embeddings, dtype=torch.int64)
            if self._counts.setdefault(table.name, counts).shape != counts.shape:
                raise ValueError(f"table {table.name} appears twice with different num_embeddings")
            for feature in table.feature_names or [table.name]:
                self._tables_of_feature.setdefault(feature, []).append(table.name)
            if table.pooling == PoolingType.MEAN:
                self._mean_tables.add(table.name)
                self._squared[table.name] = torch.zeros(table.num_embeddings, dtype=torch.float64)

    @classmethod
    def from_counts(
        cls, counts: Mapping[str, Tensor], squared_weights: Mapping[str, Tensor] | None = None
    ) -> "FrequencyCounter":
        """A counter that holds the given counts, int64 [num_embeddings] per table name; it cannot be updated.

        Args:
            counts (Mapping[str, Tensor]): by table.
            squared_weights (Optional[Mapping[str, Tensor]]): :attr:`squared_weights` of some of the tables.
        """
        counter = cls([])
        for table, values in counts.items():
            if values.dim() != 1 or values.is_floating_point() or bool((values < 0).any()):
                raise ValueError(f"counts of table {table} must be non-negative integers of shape [num_embeddings]")
            counter._counts[table] = values.to(torch.int64).cpu()
        for table, values in (squared_weights or {}).items():
            if table not in counter._counts or values.shape != counter._counts[table].shape:
                raise ValueError(f"squared weights of table {table} must be of the shape of its counts")
            counter._squared[table] = values.to(torch.float64).cpu()
        return counter

    @property
    def squared_weights(self) -> Mapping[str, Tensor]:
        """By table, float64 [num_embeddings]: the sum of each row's squared weights in the bags that it was looked up
        in, the reciprocal of its length for a bag whose mean is taken; only of tables where these are not all 1."""
        return self._squared

    def update(self, features: KeyedJaggedTensor) -> None:
        """Add the lookups of one batch; features that no table reads are passed over.

        Raises:
            ValueError: if no feature is read by a table, or this counter was loaded and so knows no features.
            IndexError: if an id is negative or not below num_embeddings; nothing is added then.
        """
        if not any(feature in self._tables_of_feature for feature in features.keys()):  # noqa: SIM118
            known = ", ".join(self._tables_of_feature) or "none: loaded counts can be merged, not updated"
            raise ValueError(f"no table reads any of the features {features.keys()}; counted features: {known}")
        lengths = features.length_per_key()
        parts = features.values().split(lengths)
        weights = features.weights_or_none()
        squares = [None] * len(parts) if weights is None else [w.double() ** 2 for w in weights.split(lengths)]
        bags = features.lengths().split(features.stride_per_key())
        new: list[tuple[str, Tensor, Tensor | None]] = []
        for feature, ids, of_weights, of_bags in zip(features.keys(), parts, squares, bags, strict=True):
            for table in self._tables_of_feature.get(feature, ()):
                rows = len(self._counts[table])
                if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
                    raise IndexError(
                        f"feature {feature} holds an id outside table {table}: ids run from {int(ids.min())} to "
                        f"{int(ids.max())}, num_embeddings is {rows}"
                    )
                is_mean = table in self._mean_tables
                of_mean = torch.repeat_interleave(of_bags.double() ** -2, of_bags.long()) if is_mean else None
                new.append((table, ids, of_mean if is_mean else of_weights))
        for table, ids, squared in new:
            counts = self._counts[table]
            ids = ids.to(counts.device, torch.int64)
            if squared is not None or table in self._squared:
                sums = self._squared.setdefault(table, counts.double())
                squared = torch.ones(len(ids), dtype=torch.float64) if squared is None else squared
                sums.index_add_(0, ids, squared.to(sums.device))
            counts.index_add_(0, ids, torch.ones_like(ids))

    def merge(self, other: "FrequencyCounter") -> "FrequencyCounter":
        """Add another counter's counts of the same tables to this one's; returns this one.

        Raises:
            ValueError: if the tables or their sizes differ; nothing is added then.
        """
        if {t: len(c) for t, c in self._counts.items()} != {t: len(c) for t, c in other._counts.items()}:
            raise ValueError(
                f"counters of different tables cannot be merged: {sorted(self._counts)} and {sorted(other._counts)}"
            )
        both, means = self._squared.keys() & other._squared.keys(), self._mean_tables | other._mean_tables
        for table in self._squared.keys() | other._squared.keys():
            if table in both or table not in means:
                self._squared[table] = self._squares(table) + other._squares(table)
            else:
                self._squared.pop(table, None)  # some counts came without the lengths of their bags
        for table, counts in other._counts.items():
            self._counts[table] += counts
        return self

    def _squares(self, table: str) -> Tensor:
        return self._squared[table] if table in self._squared else self._counts[table].double()

    def merge_across_ranks(self, group: dist.ProcessGroup | None = None) -> "FrequencyCounter":
        """Add up the counts of all ranks, which all call this once; returns this counter, now equal on every rank.

        Args:
            group (Optional[ProcessGroup]): gloo or NCCL; the world by default. Alone without a process group.
        """
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
            # A rank may have seen no weights where others have.
            weighted = torch.tensor([table in self._squared for table in sorted(self._counts)], dtype=torch.int32)
            weighted = weighted.to(device)
            dist.all_reduce(weighted, dist.ReduceOp.MAX, group=group)
            for table, is_weighted in zip(sorted(self._counts), weighted.tolist(), strict=True):
                if is_weighted:
                    squares = self._squares(table).to(device)
                    dist.all_reduce(squares, group=group)
                    self._squared[table] = squares.cpu()
                counts = self._counts[table].to(device)
                dist.all_reduce(counts, group=group)
                self._counts[table] = counts.cpu()
        return self

    def __getitem__(self, table: str) -> Tensor:
        """The counts of a table, int64 [num_embeddings], on CPU."""
        if table not in self._counts:
            raise KeyError(f"no counts for table {table}; counted tables: {', '.join(sorted(self._counts)) or 'none'}")
        return self._counts[table]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the counts to one safetensors file, atomically."""
        with atomic_file(path) as temporary:
            squared = {f"{_SQUARED}{table}": values for table, values in self._squared.items()}
            save_file({**self._counts, **squared}, temporary, metadata=_FORMAT.text_header())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FrequencyCounter":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is not a frequency file of a known version.
        """
        found = read_tensors(path, _FORMAT)
        squared = {n.removeprefix(_SQUARED): found.pop(n) for n in list(found) if n.startswith(_SQUARED)}
        return cls.from_counts(found, squared)


def embedding_bag_configs(model: nn.Module) -> list[EmbeddingBagConfig]:
    """The table configs of every EmbeddingBagCollection in a model, plain or sharded.

    Raises:
        ValueError: if two collections have a table of the same name.
    """
    configs: dict[str, EmbeddingBagConfig] = {}
    for module in model.modules():
        tables: list[EmbeddingBagConfig] = []
        if isinstance(module, EmbeddingBagCollectionInterface):
            tables = module.embedding_bag_configs()
        elif isinstance(module, ShardedEmbeddingBagCollection):
            tables = tables_of_sharded(module)
        for table in tables:
            if table.name in configs:
                raise ValueError(f"two collections of the model have a table {table.name}: table names must differ")
            configs[table.name] = table
    return list(configs.values())


def count_frequencies(batches: Iterable[Any], model: nn.Module, *, progress: bool = False) -> FrequencyCounter:
    """Count the lookups of every row over a pass of the training data.

    Args:
        batches (Iterable): KeyedJaggedTensors, or objects with ``sparse_features`` as torchrec.datasets' Batch.
        model (nn.Module): a model that holds EmbeddingBagCollections, plain or sharded.
        progress (bool): show a progress bar.

    Returns:
        FrequencyCounter: this rank's counts per table, on CPU; in a job of several ranks go on with
            :meth:`FrequencyCounter.merge_across_ranks`.

    Raises:
        ValueError: if there is no batch, or no table reads any of its features.
    """
    counter = FrequencyCounter(embedding_bag_configs(model))
    seen = 0
    for batch in progress_bar(batches, desc="counting frequencies", unit="batch", disable=not progress):
        counter.update(batch if isinstance(batch, KeyedJaggedTensor) else batch.sparse_features)
        seen += 1
    if not seen:
        raise ValueError("there are no batches to count: an iterator that was used before is empty")
    return counter
