"""How often every row of every table is looked up."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.files.document import DocumentFormat
from torchrec_mpe.upstream.embedding_bag_collection import tables_of_sharded

_FORMAT = DocumentFormat("torchrec_mpe.frequencies", 1, "a frequency file")


class FrequencyCounter(Mapping[str, Tensor]):
    """Counts the lookups of every row, per table, over KeyedJaggedTensors.

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
        for table in tables:
            counts = torch.zeros(table.num_embeddings, dtype=torch.int64)
            if self._counts.setdefault(table.name, counts).shape != counts.shape:
                raise ValueError(f"table {table.name} appears twice with different num_embeddings")
            for feature in table.feature_names or [table.name]:
                self._tables_of_feature.setdefault(feature, []).append(table.name)

    @classmethod
    def from_counts(cls, counts: Mapping[str, Tensor]) -> "FrequencyCounter":
        """A counter that holds the given counts, int64 [num_embeddings] per table name; it cannot be updated."""
        counter = cls([])
        for table, values in counts.items():
            if values.dim() != 1 or values.is_floating_point() or bool((values < 0).any()):
                raise ValueError(f"counts of table {table} must be non-negative integers of shape [num_embeddings]")
            counter._counts[table] = values.to(torch.int64).cpu()
        return counter

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
        new: list[tuple[str, Tensor]] = []
        for feature, ids in zip(features.keys(), parts, strict=True):
            for table in self._tables_of_feature.get(feature, ()):
                rows = len(self._counts[table])
                if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
                    raise IndexError(
                        f"feature {feature} holds an id outside table {table}: ids run from {int(ids.min())} to "
                        f"{int(ids.max())}, num_embeddings is {rows}"
                    )
                new.append((table, ids))
        for table, ids in new:
            counts = self._counts[table]
            counts.index_add_(
                0, ids.to(counts.device, torch.int64), torch.ones_like(ids, dtype=torch.int64, device="cpu")
            )

    def merge(self, other: "FrequencyCounter") -> "FrequencyCounter":
        """Add another counter's counts of the same tables to this one's; returns this one.

        Raises:
            ValueError: if the tables or their sizes differ; nothing is added then.
        """
        if {t: len(c) for t, c in self._counts.items()} != {t: len(c) for t, c in other._counts.items()}:
            raise ValueError(
                f"counters of different tables cannot be merged: {sorted(self._counts)} and {sorted(other._counts)}"
            )
        for table, counts in other._counts.items():
            self._counts[table] += counts
        return self

    def merge_across_ranks(self, group: dist.ProcessGroup | None = None) -> "FrequencyCounter":
        """Add up the counts of all ranks, which all call this once; returns this counter, now equal on every rank.

        Args:
            group (Optional[ProcessGroup]): gloo or NCCL; the world by default. Alone without a process group.
        """
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
            for table in sorted(self._counts):
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
            save_file(dict(self._counts), temporary, metadata=_FORMAT.text_header())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FrequencyCounter":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is not a frequency file of a known version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                _FORMAT.check(Path(path), file.metadata(), text=True)
                return cls.from_counts({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a frequency file: {error}") from error


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
    for batch in tqdm(batches, desc="counting frequencies", unit="batch", disable=not progress):
        counter.update(batch if isinstance(batch, KeyedJaggedTensor) else batch.sparse_features)
        seen += 1
    if not seen:
        raise ValueError("there are no batches to count: an iterator that was used before is empty")
    return counter
