"""The model of the moment: replaced and updated while it answers."""

import threading
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from batch import Inputs
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe import ServedModel, load_delta


class CurrentModel:
    """A model, what it takes, and how to load it again.

    Args:
        load (Callable): makes the model, in eval mode; it takes dense features and a KeyedJaggedTensor, returns logits
            [B, 1], and its only collection tells its tables by ``embedding_bag_configs()``.
        num_dense (int): dense features of an example.
        max_batch (int): examples of a request.
    """

    def __init__(self, load: Callable[[], nn.Module], num_dense: int, max_batch: int) -> None:
        self._load = load
        self._reloading = threading.Lock()
        model = load()
        self.inputs = inputs_of(model, num_dense, max_batch)
        lengths = torch.ones(2 * len(self.inputs.rows), dtype=torch.int64)
        ids = torch.zeros(lengths.numel(), dtype=torch.int64)
        weights = torch.ones(ids.numel()) if self.inputs.weighted else None
        kjt = KeyedJaggedTensor(list(self.inputs.rows), ids, weights, lengths=lengths)
        # The probe is also the first request: what only the first one is slow for happens before it is accepted.
        self._served = ServedModel(model, probe=(torch.zeros(2, num_dense), kjt))

    def __call__(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Logits [B, 1]; from any thread."""
        logits: Tensor = self._served(dense, sparse)
        return logits

    def reload(self) -> None:
        """Load the model again and let it answer; requests in flight end on the old one.

        Raises:
            ValueError: if it has other features or fewer rows, so that requests that were accepted would fail, or
                answers the probe with what is no number; it is then, as with whatever loading raises, the old model
                that goes on.
        """
        with self._reloading:
            model, old = self._load(), self.inputs
            new = inputs_of(model, old.num_dense, old.max_batch)
            if (new.weighted, new.rows.keys()) != (old.weighted, old.rows.keys()):
                raise ValueError(f"the new model takes {_named(new)}, the one it would replace {_named(old)}")
            for feature, rows in old.rows.items():
                if new.rows[feature] < rows:
                    raise ValueError(f"feature {feature}: its table has {new.rows[feature]} rows, before it had {rows}")
            self._served.swap(model)
            # Only now, for ids beyond the old tables are accepted from here on.
            self.inputs = new

    def update(self, delta: bytes) -> Mapping[str, dict[str, int]]:
        """Write rows that :func:`torchrec_mpe.inference.delta.save_delta` stored; lookups go on meanwhile.

        Returns:
            Mapping[str, dict[str, int]]: by table, rows that were written, and rows of 0 bits that cannot be.

        Raises:
            IndexError, KeyError, TypeError, ValueError: in one sentence, if the delta does not fit; nothing is written.
        """
        with TemporaryDirectory() as folder, self._reloading:
            file = Path(folder) / "delta.safetensors"
            file.write_bytes(delta)
            updated = collection_of(self._served.model).apply_update(load_delta(file))
        return {name: {"written": rows.written, "zero_bits": rows.zero_bits} for name, rows in updated.items()}

    def table_bytes(self) -> int:
        """Bytes of the tables' tensors."""
        collection = collection_of(self._served.model)
        return sum(tensor.nbytes for tensor in chain(collection.parameters(), collection.buffers()))


def collection_of(model: Any) -> Any:
    """The only module with tables."""
    (found,) = (module for module in model.modules() if hasattr(module, "embedding_bag_configs"))
    return found


def inputs_of(model: nn.Module, num_dense: int, max_batch: int) -> Inputs:
    """What a model takes: its features, and the rows of the smallest table that reads each."""
    collection = collection_of(model)
    rows: dict[str, int] = {}
    for table in collection.embedding_bag_configs():
        for feature in table.feature_names:
            rows[feature] = min(table.num_embeddings, rows.get(feature, table.num_embeddings))
    return Inputs(num_dense, rows, collection.is_weighted(), max_batch)


def _named(inputs: Inputs) -> str:
    return f"{', '.join(inputs.rows)}{' with weights' if inputs.weighted else ''}"
