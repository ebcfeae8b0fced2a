"""FBGEMM's training TBE, with slots of caches for rows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from torchrec_mpe.cache.table_spec import CachedTableSpec
from torchrec_mpe.ops.cache_tensors import WAYS
from torchrec_mpe.upstream.fused_optimizers import DEFAULT_OPTIMIZER, traits_of
from torchrec_mpe.upstream.modules import ConvertsItself
from torchrec_mpe.upstream.tbe import copy_progress, decays_rows, per_row_counter


class SlotTBE(ConvertsItself):
    """A TBE whose table ``t`` has the slots of table ``t``'s cache, then its spill area, which can grow.

    Args:
        tables (Sequence[CachedTableSpec]): the tables.
        num_sets (Sequence[int]): of each table's cache.
        feature_table_map (List[int]): as FBGEMM's.
        pooling_mode (PoolingMode): as FBGEMM's.
        device (torch.device): of the slots.
        fused_params (Dict[str, Any]): the rest of FBGEMM's arguments.

    Attributes:
        values (List[Tensor]): float32 [slots, dim] of each table.
        states (List[List[Tensor]]): float32 [slots, elements] of each table and optimizer state.
        spill (List[int]): slots of each spill area.

    Raises:
        NotImplementedError: for weights or states other than FP32, or an optimizer that changes more than the rows of
            the batch and their state, or would decay rows and does not.
    """

    def __init__(
        self,
        tables: Sequence[CachedTableSpec],
        num_sets: Sequence[int],
        feature_table_map: list[int],
        pooling_mode: PoolingMode,
        device: torch.device,
        fused_params: dict[str, Any],
    ) -> None:
        super().__init__()
        self._tables, self._num_sets, self._device = list(tables), list(num_sets), device
        self._arguments = {
            **fused_params,
            "feature_table_map": feature_table_map,
            "pooling_mode": pooling_mode,
            "device": device,
            "bounds_check_mode": BoundsCheckMode.NONE,  # slots are ours
            "table_names": [table.name for table in tables],
        }
        self.spill = [table.config.spill_rows for table in tables]
        optimizer = fused_params.get("optimizer", DEFAULT_OPTIMIZER)
        if not traits_of(optimizer).only_rows_of_the_batch:
            self._refuse(f"the optimizer {optimizer.value} changes rows that are not in the batch")
        self.tbe = self._make(self.spill)
        if self.tbe.use_cpu and pooling_mode != PoolingMode.NONE and decays_rows(self.tbe):
            self._refuse("row-wise Adagrad's weight decay is not in FBGEMM's pooled kernel on CPU: train without it")
        self.values: list[Tensor] = []
        self.states: list[list[Tensor]] = []
        self._take_views()

    @property
    def optimizer(self) -> EmbOptimType:
        """The fused optimizer."""
        optimizer: EmbOptimType = self.tbe.optimizer
        return optimizer

    @property
    def output_dtype(self) -> torch.dtype:
        """Of pooled embeddings."""
        dtype: torch.dtype = SparseType.from_int(self.tbe.output_dtype).as_dtype()
        return dtype

    def forward(self, slots: Tensor, offsets: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """As FBGEMM's, with slots for ids."""
        output: Tensor = self.tbe(slots, offsets, *arguments, **named)
        return output

    @torch.no_grad()
    def grow(self, spill: Sequence[int]) -> None:
        """Make the spill areas as large as this, none smaller than before. No graph may refer to the slots any more."""
        old, values, states = self.tbe, self.values, self.states
        grown = self._make(spill)
        new_values, new_states = _matrices(grown)
        for t in range(len(self._tables)):
            for new, before in zip([new_values[t], *new_states[t]], [values[t], *states[t]], strict=True):
                new[: len(before)] = before
        copy_progress(old, grown)
        self.tbe, self.values, self.states, self.spill = grown, new_values, new_states, list(spill)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._take_views()  # a copied parameter is elsewhere than the copies of its views

    def convert(self, convert: Callable[[Tensor], Tensor], recurse: bool) -> None:
        super().convert(convert, recurse)
        self._take_views()

    def _make(self, spill: Sequence[int]) -> SplitTableBatchedEmbeddingBagsCodegen:
        cuda = self._device.type == "cuda"
        location = EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST
        compute = ComputeDevice.CUDA if cuda else ComputeDevice.CPU
        return SplitTableBatchedEmbeddingBagsCodegen(
            [
                (WAYS * sets + more, table.dim, location, compute)
                for table, sets, more in zip(self._tables, self._num_sets, spill, strict=True)
            ],
            **self._arguments,
        )

    def _take_views(self) -> None:
        self.values, self.states = _matrices(self.tbe)
        if any(values.device.type != self._device.type for values in self.values):
            self._refuse(f"its rows cannot move to another device than {self._device}, on which it was made")
        if any(t.dtype != torch.float32 for t in [*self.values, *(s for of_table in self.states for s in of_table)]):
            self._refuse("cached rows and their optimizer state must be FP32")
        counter = per_row_counter(self.tbe, sum(map(len, self.values)))
        if counter is not None:
            self._refuse(f"the optimizer keeps {counter} of rows, which the store does not hold")

    def _refuse(self, why: str) -> None:
        raise NotImplementedError(f"tables {', '.join(table.name for table in self._tables)}: {why}")


def _matrices(tbe: SplitTableBatchedEmbeddingBagsCodegen) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Values and optimizer states by table, as views of the TBE's memory.

    Of ``data``: rows move between the forward and the backward of another batch, which autograd is not to count as a
    change of what the backward needs.
    """
    values = [rows.data for rows in tbe.split_embedding_weights()]
    if not traits_of(tbe.optimizer).state_elements(1):
        return values, [[] for _ in values]
    states = tbe.split_optimizer_states()
    return values, [
        [state.data.view(len(rows), -1) for state in of_table] for rows, of_table in zip(values, states, strict=True)
    ]
