"""Bytes of the optimizer state that FBGEMM keeps beside the rows."""

from collections.abc import Mapping
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type

_FP32 = 4
# States of D elements and of one element a row. Source: SplitTableBatchedEmbeddingBagsCodegen.__init__ of FBGEMM 1.8.
_STATES = {
    EmbOptimType.NONE: (0, 0),
    EmbOptimType.SGD: (1, 0),
    EmbOptimType.EXACT_SGD: (0, 0),
    EmbOptimType.EXACT_ADAGRAD: (1, 0),
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: (0, 1),
    EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD: (0, 1),
    EmbOptimType.LARS_SGD: (1, 0),
    EmbOptimType.ADAM: (2, 0),
    EmbOptimType.LAMB: (2, 0),
    EmbOptimType.PARTIAL_ROWWISE_ADAM: (1, 1),
    EmbOptimType.PARTIAL_ROWWISE_LAMB: (1, 1),
    EmbOptimType.ENSEMBLE_ROWWISE_ADAGRAD: (1, 1),
}


def fused_optimizer(weight: Tensor, fused_params: Mapping[str, Any] | None) -> EmbOptimType:
    """The optimizer of a table's TBE: that of ``apply_optimizer_in_backward``, else of ``fused_params``.

    TorchRec's planner knows only the former, and counts no state for the latter. FBGEMM's default is EXACT_SGD.
    """
    classes = getattr(weight, "_optimizer_classes", None)
    if classes:
        return optimizer_type_to_emb_opt_type(classes[0])
    return (fused_params or {}).get("optimizer", EmbOptimType.EXACT_SGD)


def state_bytes_per_row(optimizer: EmbOptimType, columns: int, table: str) -> int:
    """Bytes of state that a row of ``columns`` float32 elements has.

    Row-wise states are one element for each column shard of a row, so that column-wise sharding has more of them.

    Raises:
        ValueError: for an optimizer whose state is not known, naming the table.
    """
    return sum(state_elements(optimizer, columns, table)) * _FP32


def state_elements(optimizer: EmbOptimType, columns: int, table: str) -> list[int]:
    """Elements that a row of ``columns`` elements has in each state; raises as :func:`state_bytes_per_row`."""
    if optimizer not in _STATES:
        raise ValueError(
            f"table {table}: the optimizer state of {optimizer} is not known; known are "
            f"{', '.join(sorted(known.name for known in _STATES))}"
        )
    elementwise, rowwise = _STATES[optimizer]
    return [columns] * elementwise + [1] * rowwise
