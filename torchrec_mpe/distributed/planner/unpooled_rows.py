"""The unpooled rows of the search and retrain phases: their memory, and the traffic that they cause."""

from dataclasses import dataclass

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from torchrec_mpe.distributed.planner.lookups import distinct_rows
from torchrec_mpe.upstream.fused_optimizers import traits_of

_FP32 = 4
_INT32 = 4
_INT64 = 8
# The index tensors that the bag op's kernels for CUDA make in backward, for each id: row number and table, int64, and
# the group or candidate, at most int32; besides two int64 while the former are made.
_CUDA_INDEX_BYTES = 4 * _INT64 + _INT32


@dataclass(frozen=True)
class UnpooledRows:
    """What one shard's lookups of one step hold and move, beyond TorchRec's pooled lookups.

    Attributes:
        activations (int): bytes saved for backward: float32 rows [N, D] and the index tensors of the lookup.
        gradients (int): bytes of the rows' gradients, and of what is needed to make them.
        forward_traffic (float): bytes that forward reads and writes, from the TBE's writing the rows on.
        backward_traffic (float): bytes that backward reads and writes, up to the TBE's reading the rows' gradients.
    """

    activations: int = 0
    gradients: int = 0
    forward_traffic: float = 0
    backward_traffic: float = 0


def unpooled_rows(
    lookups: list[float],
    rows: int,
    columns: int,
    map_bytes: int,
    compute_device: str,
    compute_kernel: str,
    optimizer: EmbOptimType,
) -> UnpooledRows:
    """The unpooled rows of one shard.

    With N rows of D columns looked up, R = 4 N D bytes and m bytes a row of the map:

    ==============================  =====================  =============  ==============  ==============
    device, kernel                  N                      held           forward moves   backward moves
    ==============================  =====================  =============  ==============  ==============
    CPU, fused or cached            distinct ids           2 R            2 R + N m       3 R + N m
    CPU, dense                      ids                    2 R            2 R + N m       3 R + N m
    CUDA                            ids                    3 R            4 R + N m       5 R + N m
    ==============================  =====================  =============  ==============  ==============

    On CPU the rows are written by the lookup, read by the op that quantizes and pools, saved for backward, read again,
    and their gradient is written once and read by the TBE. On CUDA the quantized rows and the rows' share of the pooled
    gradient are written and read as well. Source: the C++ and CUDA kernels of
    :mod:`torchrec_mpe.ops.quantized_embedding_bag`.

    Args:
        lookups (list[float]): ids of each feature in this shard.
        rows (int): of the shard.
        columns (int): D, of the shard.
        map_bytes (int): m.
        compute_device (str): "cpu" or "cuda".
        compute_kernel (str): an EmbeddingComputeKernel's value.
        optimizer (EmbOptimType): of the TBE.
    """
    ids = sum(lookups)
    if not rows or not ids:
        return UnpooledRows()
    fused_on_cpu = compute_device == "cpu" and compute_kernel != EmbeddingComputeKernel.DENSE.value
    # With these optimizers each distinct row is looked up once: torchrec_mpe.distributed.one_table_lookup.
    if fused_on_cpu and traits_of(optimizer).one_table:
        found = sum(distinct_rows(of_feature, rows) for of_feature in lookups)
        # Distinct ids, their row numbers and bags of one row, int64; where each id is among them, int32.
        index_bytes = 3 * _INT64 * found + _INT32 * ids
    else:
        found, index_bytes = ids, 0.0
    row_bytes = found * columns * _FP32
    moved_map = found * map_bytes
    if compute_device == "cpu":
        return UnpooledRows(
            round(row_bytes + index_bytes), round(row_bytes), 2 * row_bytes + moved_map, 3 * row_bytes + moved_map
        )
    return UnpooledRows(
        round(row_bytes),
        round(2 * row_bytes + ids * _CUDA_INDEX_BYTES),
        4 * row_bytes + moved_map,
        5 * row_bytes + moved_map,
    )
