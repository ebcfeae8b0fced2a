"""How far quantized rows are from the rows that they stand for."""

import math

import torch
from torch import Tensor


class RowErrors:
    """Errors of a table's quantized rows, summed up piece by piece in float64.

    Example::

        errors = RowErrors()
        errors.add(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]), torch.tensor([7]))
        errors.relative_rms, errors.max_abs_error   # (0.2, 1.0)
    """

    def __init__(self) -> None:
        self.max_abs_error = 0.0
        self._weighted = [0.0, 0.0]
        self._plain = [0.0, 0.0]

    def add(self, rows: Tensor, quantized: Tensor, lookups: Tensor) -> None:
        """Add some rows.

        Args:
            rows (Tensor): [n, D].
            quantized (Tensor): [n, D], what is read in their place.
            lookups (Tensor): [n].
        """
        if not len(rows):
            return
        values = rows.double()
        difference = values - quantized
        self.max_abs_error = max(self.max_abs_error, float(difference.abs().max()))
        for k, squares in enumerate((difference.square().sum(1), values.square().sum(1))):
            self._weighted[k] += float(lookups.to(squares) @ squares)
            self._plain[k] += float(squares.sum())

    @property
    def weighted_relative_rms(self) -> float | None:
        """Root of ``sum(lookups * |row - quantized|^2) / sum(lookups * |row|^2)``; None if that divides by zero."""
        return _root(self._weighted)

    @property
    def relative_rms(self) -> float | None:
        """The same with all rows alike."""
        return _root(self._plain)

    @property
    def decisive_relative_rms(self) -> float:
        """The weighted one, of a table without lookups the plain one, of rows that are all zeros 0."""
        found = self.weighted_relative_rms
        found = self.relative_rms if found is None else found
        return 0.0 if found is None and self.max_abs_error == 0 else math.inf if found is None else found


def quantized_rows(rows: Tensor, bits: Tensor, alpha: Tensor, beta: Tensor, zero_row: Tensor | None) -> Tensor:
    """Rows as they are read after packing, by the same float32 operations.

    Args:
        rows (Tensor): float32 [n, D].
        bits (Tensor): uint8 [n], 0 to 8.
        alpha (Tensor): float32 [9], step size of each bit-width.
        beta (Tensor): float32 [D].
        zero_row (Optional[Tensor]): float32 [D], what 0-bit rows read; None: zeros.

    Returns:
        Tensor: float32 [n, D].
    """
    width = bits.long().unsqueeze(1)
    is_zero = width == 0
    step = torch.where(is_zero, 1.0, alpha[width])
    half = torch.where(is_zero, 1.0, 2.0 ** (width - 1))
    codes = ((rows - beta) / step).round_().clamp_(min=-half, max=half - 1)
    zeros = torch.zeros(rows.shape[1]) if zero_row is None else zero_row
    return torch.where(is_zero, zeros, codes * step + beta)


def _root(sums: list[float]) -> float | None:
    return math.sqrt(sums[0] / sums[1]) if sums[1] > 0 else None
