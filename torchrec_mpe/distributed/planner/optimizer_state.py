"""Bytes of the optimizer state that FBGEMM keeps beside the rows."""

from collections.abc import Mapping
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor

from torchrec_mpe.upstream.fused_optimizers import DEFAULT_OPTIMIZER, FUSED_OPTIMIZERS
from torchrec_mpe.upstream.optimizers import optimizer_in_backward

_FP32 = 4


def fused_optimizer(weight: Tensor, fused_params: Mapping[str, Any] | None) -> EmbOptimType:
    """The optimizer of a table's TBE: that of ``apply_optimizer_in_backward``, else of ``fused_params``.

    TorchRec's planner knows only the former, and counts no state for the latter.
    """
    return optimizer_in_backward(weight) or (fused_params or {}).get("optimizer", DEFAULT_OPTIMIZER)


def state_bytes_per_row(optimizer: EmbOptimType, columns: int, table: str) -> int:
    """Bytes of state that a row of ``columns`` float32 elements has.

    Row-wise states are one element for each column shard of a row, so that column-wise sharding has more of them.

    Raises:
        ValueError: for an optimizer whose state is not known, naming the table.
    """
    return sum(state_elements(optimizer, columns, table)) * _FP32


def state_elements(optimizer: EmbOptimType, columns: int, table: str) -> list[int]:
    """Elements that a row of ``columns`` elements has in each state; raises as :func:`state_bytes_per_row`."""
    if optimizer not in FUSED_OPTIMIZERS:
        raise ValueError(
            f"table {table}: the optimizer state of {optimizer} is not known; known are "
            f"{', '.join(sorted(known.name for known in FUSED_OPTIMIZERS))}"
        )
    return FUSED_OPTIMIZERS[optimizer].state_elements(columns)
