"""Counters and memory of FBGEMM's training TBE that its interface does not hand out."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode as BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode as PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen as SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

_PROGRESS = ("iter", "iter_cpu", "learning_rate_tensor")
_PER_ROW_COUNTERS = ("prev_iter", "row_counter")


def set_steps(tbe: SplitTableBatchedEmbeddingBagsCodegen, steps: int) -> None:
    """Set how many steps a TBE's optimizer has taken, on the device and, in newer releases, on the host."""
    tbe.set_optimizer_step(steps)
    if hasattr(tbe, "iter_cpu"):
        tbe.iter_cpu.fill_(steps)


@contextmanager
def steps_kept(tbes: Iterable[nn.Module]) -> Iterator[None]:
    """Let TBEs, which count every forward, and modules like them go on as if there had been none."""
    counters: list[tuple[Tensor, Tensor]] = []
    steps: list[tuple[nn.Module, int]] = []
    for tbe in tbes:
        for name in ("iter", "iter_cpu"):
            if isinstance(counter := getattr(tbe, name, None), Tensor):
                counters.append((counter, counter.clone()))
        if isinstance(step := getattr(tbe, "step", None), int):
            steps.append((tbe, step))
    try:
        yield
    finally:
        for counter, before in counters:
            counter.copy_(before)
        for tbe, step in steps:
            setattr(tbe, "step", step)  # noqa: B010  (a Module's attributes are tensors and modules to mypy)


def copy_progress(old: SplitTableBatchedEmbeddingBagsCodegen, new: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    """Let a TBE go on counting steps, with the learning rate, where another one of the same arguments is."""
    for name, buffer in old.named_buffers():
        if name in _PROGRESS:
            new.get_buffer(name).copy_(buffer)
    new.step = old.step
    new.set_learning_rate(old.get_learning_rate())


def per_row_counter(tbe: SplitTableBatchedEmbeddingBagsCodegen, rows: int) -> str | None:
    """The name of a counter that the optimizer keeps for each of so many rows beside its states; None if there is none.

    FBGEMM registers such counters for every optimizer, with one element where they are not used.
    """
    tensors: list[tuple[str, Tensor]] = [*tbe.named_buffers(), *tbe.named_parameters()]
    for name, tensor in tensors:
        if name.startswith(_PER_ROW_COUNTERS) and tensor.numel() >= rows:
            return name.rsplit("_", 1)[0]
    return None


def lies_like_one_table(tbe: SplitTableBatchedEmbeddingBagsCodegen, state_elements: list[int]) -> bool:
    """Whether a TBE's tables, of equal width, and their only state lie in memory one after the other, without gaps.

    Args:
        tbe (SplitTableBatchedEmbeddingBagsCodegen): on CPU.
        state_elements (List[int]): elements a row of each state, at most one.
    """
    rows = [spec[0] for spec in tbe.embedding_specs]
    first = [sum(rows[:t]) for t in range(len(rows))]
    places = [(tbe.weights_physical_offsets, tbe.dims[0])]
    if state_elements:
        places.append((tbe.momentum1_physical_offsets, state_elements[0]))
    return all([int(offset) for offset in offsets] == [row * width for row in first] for offsets, width in places)


def decays_rows(tbe: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    """Whether the optimizer decays the rows of a batch, which row-wise Adagrad's pooled kernel on CPU leaves out."""
    row_wise: bool = tbe.optimizer == EmbOptimType.EXACT_ROWWISE_ADAGRAD
    return row_wise and bool(tbe.optimizer_args.weight_decay)


def clips_lookups(tbe: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    """Whether the gradient of every lookup is clipped before those of a row are added up."""
    clips: bool = tbe.optimizer_args.gradient_clipping
    return clips


def buffers_as_one_table(tbe: SplitTableBatchedEmbeddingBagsCodegen, *, has_state: bool) -> dict[str, Any]:
    """A TBE's buffers, with those replaced that say where tables and features begin, as for one table in one feature.

    Args:
        tbe (SplitTableBatchedEmbeddingBagsCodegen): for which :func:`lies_like_one_table`.
        has_state (bool): of the optimizer.
    """
    total, dim = sum(spec[0] for spec in tbe.embedding_specs), tbe.dims[0]
    buffers: dict[str, Any] = {
        **tbe._buffers,
        "D_offsets": torch.tensor([0, dim], dtype=torch.int32),
        "hash_size_cumsum": torch.tensor([0, total]),
        "rows_per_table": torch.tensor([total]),
        "feature_dims": torch.tensor([dim]),
        "weights_offsets": torch.zeros(1, dtype=torch.int64),
        "weights_placements": tbe.weights_placements[:1],
    }
    if has_state:
        buffers["momentum1_offsets"] = torch.zeros(1, dtype=torch.int64)
        buffers["momentum1_placements"] = tbe.momentum1_placements[:1]
    return buffers
