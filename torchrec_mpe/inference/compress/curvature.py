"""How sharply the loss curves in the pooled embeddings of each table: the metric in which rows are coded."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module

from torchrec_mpe.distributed.sum_over_ranks import sum_over_ranks_
from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.files.document import DocumentFormat
from torchrec_mpe.files.progress import progress_bar
from torchrec_mpe.files.tensors_file import read_tensors
from torchrec_mpe.inference.compress.evaluated import Forward, evaluated, outputs_of, ranks_of
from torchrec_mpe.inference.compress.pooled_leaves import PooledLeaves

Loss = Callable[[Tensor, Any], Tensor]
"""(outputs, batch) -> loss of each example, or their sum."""

_FORMAT = DocumentFormat("torchrec_mpe.curvature", 1, "a curvature file", "measure it again")


class Curvature(Mapping[str, Tensor]):
    """The curvature of the loss in each table's pooled embeddings, from :func:`torchrec_mpe.measure_curvature`.

    Args:
        matrices (Mapping[str, Tensor]): by table, float64 [D, D], symmetric and positive semi-definite.

    Raises:
        ValueError: naming the table, if a matrix is not square and finite.
    """

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        for table, matrix in matrices.items():
            if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not bool(matrix.isfinite().all()):
                raise ValueError(f"table {table}: its curvature must be a finite matrix [D, D]")
        self._matrices = {table: matrix.to("cpu", torch.float64).contiguous() for table, matrix in matrices.items()}

    def __getitem__(self, table: str) -> Tensor:
        """Of a table, float64 [D, D], on CPU."""
        if table not in self._matrices:
            raise KeyError(f"no curvature for table {table}; measured tables: {', '.join(self._matrices) or 'none'}")
        return self._matrices[table]

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        with atomic_file(path) as temporary:
            save_file(self._matrices, temporary, metadata=_FORMAT.text_header())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Curvature":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is not a curvature file of a known version.
        """
        return cls(read_tensors(path, _FORMAT))


def measure_curvature(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    forward: Forward | None = None,
    num_batches: int | None = None,
    progress: bool = False,
) -> Curvature:
    """Measure how sharply the loss curves in the pooled embeddings of each table, on a few batches of training data.

    For each table it is the mean over examples of ``sum J^T H J``, over the features that read the table: J is the
    derivative of the model's outputs in a pooled embedding, [heads, D], and H that of the loss in the outputs, taken
    twice, [heads, heads], without its negative eigenvalues. That is the Gauss-Newton approximation of the Hessian,
    [D, D]. Of the logistic loss H is ``p (1 - p)``, whatever the labels.

    The network is in eval mode meanwhile; rows, parameters and buffers stay as they are, modes too. A few dozen batches
    are enough. The outputs of an example are taken to depend on its own embeddings alone, not on those of other
    examples of the batch.

    Args:
        model (nn.Module): DistributedModelParallel, sharded in any way or unsharded. In a sharded model every rank
            takes part, with equally many batches of its own, and gets the mean over the examples of all.
        batches (Iterable): as of torchrec.datasets, KeyedJaggedTensors, or whatever ``forward`` takes.
        loss (Optional[Callable]): (outputs, batch) -> loss of each example, or their sum, to be derived twice; by
            default the logistic loss of each output, which needs no labels.
        forward (Optional[Callable]): (model, batch) -> outputs, logits by default, [batch] or [batch, heads]; by
            default ``model(batch.dense_features, batch.sparse_features)``, or ``model(batch)`` of a KeyedJaggedTensor.
        num_batches (Optional[int]): to take; all by default.
        progress (bool): show a progress bar.

    Returns:
        Curvature: float64 [D, D] of every table, equal on all ranks.

    Raises:
        ValueError: if there is no collection or no batch; naming the tables, if the loss has no gradient in them or the
            curvature is not finite; or if the loss does not curve in the outputs.

    Example::

        curvature = measure_curvature(dmp, batches, num_batches=20)
        squared = measure_curvature(dmp, batches, loss=lambda outputs, batch: (outputs - batch.labels[:, None]) ** 2)
    """
    source = get_unwrapped_module(model)
    group, device = ranks_of(model)
    pooled = PooledLeaves(source)
    sums = {
        config.name: torch.zeros(config.embedding_dim, config.embedding_dim, dtype=torch.float64, device=device)
        for config in pooled.configs
    }
    # Found on all ranks before one raises: others would wait for it. Examples, and how often the loss curved.
    found = torch.zeros(2, dtype=torch.float64)
    if num_batches is None and isinstance(batches, Sized):
        num_batches = len(batches)
    bar = progress_bar(total=num_batches, desc="measuring curvature", unit="batch", disable=not progress)
    with bar, evaluated(source), pooled.cut():
        for batch in islice(batches, num_batches):
            outputs = outputs_of(source, batch, forward, device)
            factor = _curvature_factor(outputs.detach(), batch, loss)
            found += torch.tensor([len(outputs), float(factor.abs().sum() != 0)], dtype=torch.float64)
            for head in range(factor.shape[2]):
                more = head + 1 < factor.shape[2]
                for table, gradient in pooled.gradients(outputs, factor[:, :, head].view_as(outputs), keep_graph=more):
                    sums[table] += gradient.T @ gradient
            pooled.forget()
            bar.update()
    sum_over_ranks_(found, group, device)
    for table in sums:
        sums[table] = sum_over_ranks_(sums[table].cpu(), group, device) / found[0]
    _check(sums, int(found[0]), curved=bool(found[1]))
    return Curvature(sums)


def _curvature_factor(outputs: Tensor, batch: Any, loss: Loss | None) -> Tensor:
    """[batch, heads, heads], of which the products with their own transposes are the Hessians in the outputs."""
    if loss is None:
        probability = outputs.double().view(len(outputs), -1).sigmoid()
        return (probability * (1 - probability)).sqrt().to(outputs.dtype).diag_embed()
    hessian = _hessian(outputs, batch, loss).double()
    finite = hessian.isfinite().flatten(1).all(1)[:, None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, (hessian + hessian.mT) / 2, 0))
    factor = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return torch.where(finite, factor, torch.nan).to(outputs.dtype)


@torch.enable_grad()
def _hessian(outputs: Tensor, batch: Any, loss: Loss) -> Tensor:
    """The second derivatives of the loss in the outputs of each example, [batch, heads, heads]."""
    at = outputs.clone().requires_grad_()
    zeros = torch.zeros_like(at).view(len(at), -1)
    (slope,) = torch.autograd.grad(loss(at, batch).sum(), at, create_graph=True)
    if not slope.requires_grad:  # linear in the outputs
        return zeros.diag_embed()
    slopes = slope.view_as(zeros).unbind(1)
    columns = [torch.autograd.grad(of_head.sum(), at, retain_graph=True)[0].view_as(zeros) for of_head in slopes]
    return torch.stack(columns, dim=2)


def _check(curvature: Mapping[str, Tensor], examples: int, *, curved: bool) -> None:
    if not examples:
        raise ValueError("there are no batches to measure on: an iterator that was used before is empty")
    if wrong := [table for table, matrix in curvature.items() if not bool(matrix.isfinite().all())]:
        raise ValueError(
            f"the curvature of {_tables(wrong)} is not finite: the model's outputs, or the loss's second derivatives, "
            "hold NaN or infinity"
        )
    if not curved:
        raise ValueError("the loss does not curve in the model's outputs: its second derivatives there are all 0")
    if wrong := [table for table, matrix in curvature.items() if not bool(matrix.any())]:
        raise ValueError(
            f"no gradient reaches {_tables(wrong)}: the model's outputs do not depend on what is pooled from there"
        )


def _tables(names: list[str]) -> str:
    return f"table {names[0]}" if len(names) == 1 else f"tables {', '.join(names)}"
