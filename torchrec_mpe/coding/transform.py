"""The rotation of a table's rows into the metric that the loss sees."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_mpe.coding.owned_rows import TableToCode
from torchrec_mpe.ops.reference.run_coding import MAX_COMPONENTS

_DAMPING = 0.02  # of the mean curvature of an element, added to every one


@dataclass(frozen=True, eq=False)
class Transform:
    """Components of a table's rows, those that matter most to the loss first.

    With ``x = row - mean``, the loss sees the length of ``x @ metric``. Component k of a row is ``x @ encoder[:, k]``,
    and adds itself times ``basis[k]`` to the row: what is wrong in it by e costs ``e**2 * costs[k]``, beside the other
    components, because basis rows are orthogonal in the metric, but for their rounding.

    Attributes:
        metric (Tensor): float64 [D, D], symmetric.
        mean (Tensor): float16 [D], the weighted mean row.
        basis (Tensor): float16 [K, D]; the element of largest magnitude of each row is 1.
        encoder (Tensor): float32 [D, K].
        costs (Tensor): float64 [K].
        energy (Tensor): float64 [D], the share of each component in the weighted squared length of all rows; 0 if
            all rows are alike.
    """

    metric: Tensor
    mean: Tensor
    basis: Tensor
    encoder: Tensor
    costs: Tensor
    energy: Tensor


def fit_transform(table: TableToCode) -> Transform:
    """Read all rows once; mean and second moment are summed up over ranks in float64.

    Returns:
        Transform: of the first 16 components, or D where that is smaller.

    Raises:
        ValueError: naming the table, if the curvature is zero or not finite, a row is not finite, or the mean is beyond
            float16.
    """
    metric = _metric(table)
    weight, total, moment = _moments(table)
    mean = (total / weight).half() if weight > 0 else torch.zeros(table.embedding_dim, dtype=torch.float16)
    if not bool(mean.isfinite().all()):
        raise ValueError(f"table {table.name}: its mean row is beyond float16, up to {(total / weight).abs().max():g}")
    center = mean.double()
    shifted = torch.outer(center, total)
    moment = moment - shifted - shifted.T + weight * torch.outer(center, center)
    values, vectors = torch.linalg.eigh(metric @ moment @ metric)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    kept = min(table.embedding_dim, MAX_COMPONENTS)
    basis = torch.linalg.solve(metric, vectors[:, :kept]).T
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    stored = (basis / largest).half()
    rounded = stored.double() @ metric
    gram = rounded @ rounded.T
    encoder = torch.linalg.solve(gram, rounded @ metric).T
    energy = values / values.sum() if float(values.sum()) > 0 else torch.zeros_like(values)
    return Transform(metric, mean, stored, encoder.float().contiguous(), gram.diagonal().clone(), energy)


def _metric(table: TableToCode) -> Tensor:
    curvature = (table.curvature + table.curvature.T) / 2
    size = float(curvature.diagonal().mean())
    if not bool(curvature.isfinite().all()) or not size > 0:
        raise ValueError(f"table {table.name}: its curvature is {'zero' if size == 0 else 'not finite and positive'}")
    values, vectors = torch.linalg.eigh(curvature)
    root = (values.clamp(min=0) + _DAMPING * size).sqrt()
    return torch.mm(vectors * root, vectors.T)


def _moments(table: TableToCode) -> tuple[float, Tensor, Tensor]:
    """Weight of all rows, weighted sum of rows [D] and of their outer products [D, D], over all ranks, float64."""
    dim = table.embedding_dim
    sums = torch.zeros(3 + dim + dim * dim, dtype=torch.float64)
    total, moment = sums[3 : 3 + dim], sums[3 + dim :].view(dim, dim)
    bad: int | None = None
    for first, piece in table.rows.pieces():
        # Pieces are read to the end all the same: other ranks may take part in each.
        if bad is None and not bool(piece.isfinite().all()):
            bad = first + int(torch.nonzero(~piece.isfinite().all(1))[0])
        if bad is not None:
            continue
        weights = table.row_weights(slice(first, first + len(piece)))
        rows = piece.double()
        weighted = rows * weights.unsqueeze(1)
        sums[0] += weights.sum()
        total += weighted.sum(0)
        moment += weighted.T @ rows
    if bad is not None:
        sums.zero_()
        sums[1:3] = torch.tensor([1, bad])
    sums = table.rows.sum(sums)
    if float(sums[1]) > 0:
        row = bad if bad is not None or float(sums[1]) > 1 else int(sums[2])
        where = "rows of other ranks hold" if row is None else f"row {row} holds"
        raise ValueError(f"table {table.name}: {where} NaN or infinite values")
    return float(sums[0]), sums[3 : 3 + dim], sums[3 + dim :].view(dim, dim)
