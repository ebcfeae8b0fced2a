"""Bit-widths, step sizes and offset of one table that make ``error + price * bytes`` small."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from torchrec_mpe.ops.reference.bitpack import row_bytes
from torchrec_mpe.packing.bit_widths import MAX_BITS, TableBitWidths
from torchrec_mpe.packing.choose_directory import choose_directory
from torchrec_mpe.precision.row_histograms import RowHistograms, candidate_step_sizes

_STEP_SIZES = 40
_ROUNDS = 4  # of fitting step sizes to widths and widths to step sizes
# Codes reach one step further down than up. Shifted up by half a step they lie evenly about the mean row, but a table
# has one offset for all its widths: which of these parts of its root mean square serves them best is tried out.
_SHIFTS = (0.0, 0.03, 0.08, 0.2, 0.4, 0.8)

_EVERY = tuple(range(MAX_BITS + 1))

KINDS: tuple[tuple[int, ...], ...] = (_EVERY, *((0, b) for b in _EVERY[1:]), *((b,) for b in _EVERY))
"""Widths that a table may have together. One width needs no directory, a bitmap tells rows of 0 bits from rows of one
other width, and all other mixtures need a larger directory, unless ids are in that order."""

_FORBIDDEN = torch.full((len(KINDS), MAX_BITS + 1), float("inf"), dtype=torch.float64)
for _kind, _widths in enumerate(KINDS):
    _FORBIDDEN[_kind, list(_widths)] = 0.0


class ValidWidths(TableBitWidths):
    """Widths cut from bounds and order that are known to fit: checking order takes time that grows with the rows."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class TableScales:
    """What dequantization of one table needs.

    Attributes:
        alpha (Tensor): float32 [9], step size of each bit-width; alpha[0] = 0.
        beta (Tensor): float32 [D], offset.
        zero_row (Optional[Tensor]): float32 [D], what 0-bit rows read; None: zeros.
    """

    alpha: Tensor
    beta: Tensor
    zero_row: Tensor | None


@dataclass(frozen=True)
class Allocation:
    """Widths of a table's segments, and what they cost.

    Attributes:
        bounds (tuple[int, ...]): order around the segments.
        bits (tuple[int, ...]): of each segment.
        errors (Tensor): float64 [segments, 9], weighted squared error of each width.
        allowed (tuple[int, ...]): the widths that keep the kind of directory.
        alpha (Tensor): float64 [9], alpha[0] = 0.
        shift (float): of the offset, against the mean row.
        total_bytes (int): rows and directory.
    """

    bounds: tuple[int, ...]
    bits: tuple[int, ...]
    errors: Tensor
    allowed: tuple[int, ...]
    alpha: Tensor
    shift: float
    total_bytes: int

    @property
    def error(self) -> float:
        """Weighted squared error of all rows."""
        return float(self.errors[torch.arange(len(self.bits)), torch.tensor(self.bits)].sum())


@dataclass(frozen=True)
class _Minimum:
    """What alternating minimization came to for each kind and offset: [kinds, H, ...].

    Attributes:
        bits (Tensor): int64 [kinds, H, segments].
        step (Tensor): int64 [kinds, H, 8], which step size of each bit-width.
        errors (Tensor): float64 [kinds, H, segments, 9], of every width at these step sizes.
        value (Tensor): float64 [kinds, H], error + price * bytes of rows.
    """

    bits: Tensor
    step: Tensor
    errors: Tensor
    value: Tensor

    def or_better(self, other: "_Minimum") -> "_Minimum":
        """The better of two, for each kind and offset."""
        is_better = other.value < self.value
        some, all_widths = is_better.unsqueeze(2), is_better.view(*is_better.shape, 1, 1)
        return _Minimum(
            torch.where(some, other.bits, self.bits),
            torch.where(some, other.step, self.step),
            torch.where(all_widths, other.errors, self.errors),
            torch.minimum(other.value, self.value),
        )


class TableCandidates:
    """The widths that a table's segments can have, and what each costs.

    Args:
        name (str): table.
        histograms (RowHistograms): of its rows.
        order (Optional[Tensor]): int32 [num_embeddings], None when ids are in that order.
        zero_row (bool): 0-bit rows read their weighted mean, not zeros.
    """

    def __init__(self, name: str, histograms: RowHistograms, order: Tensor | None, zero_row: bool) -> None:
        self.name = name
        self.order = order
        self.embedding_dim = len(histograms.center)
        # Of the histograms only what is small is kept: there may be a thousand tables.
        self.bounds = histograms.bounds
        self.center, self.weights = histograms.center, histograms.weights
        self.sums, self.squares = histograms.sums, histograms.squares
        self._zero_row = zero_row
        rows = torch.tensor(histograms.bounds, dtype=torch.float64).diff()
        self._row_bytes = torch.tensor(
            [row_bytes(self.embedding_dim, b) for b in range(MAX_BITS + 1)], dtype=torch.float64
        )
        self._payload = rows.unsqueeze(1) * self._row_bytes
        self._steps = candidate_step_sizes(histograms, _STEP_SIZES)
        total_weight = float(histograms.weights.sum()) * self.embedding_dim
        self._shifts = (float(histograms.squares.sum()) / total_weight) ** 0.5 * torch.tensor(
            _SHIFTS, dtype=torch.float64
        )
        self._errors = torch.stack(
            [histograms.errors(b, self._steps[b - 1], self._shifts) for b in range(1, MAX_BITS + 1)], 2
        )  # [H, S, 8, A]
        self._bytes: dict[tuple[int, ...], int] = {}

    def widths(self, bounds: Sequence[int], bits: Sequence[int]) -> TableBitWidths:
        """Bit-widths of these segments, without the checks that take time."""
        return ValidWidths(bounds[-1], self.embedding_dim, tuple(bounds), tuple(bits), self.order)

    def total_bytes(self, bounds: Sequence[int], bits: Sequence[int]) -> int:
        """Bytes of rows, runs and directory."""
        return choose_directory(self.name, self.widths(bounds, bits)).total_bytes

    def zero_rows(self, share: Tensor) -> Tensor:
        """What 0-bit rows read, less the center.

        Args:
            share (Tensor): float64 [..., segments], the part of each segment's rows that has 0 bits.

        Returns:
            Tensor: float64 [..., D].
        """
        if not self._zero_row:
            return (-self.center).expand(*share.shape[:-1], -1)
        return share @ self.sums / (share @ self.weights).clamp(min=1e-300).unsqueeze(-1)

    def _zero_bit_errors(self, zero_row: Tensor) -> Tensor:
        """Weighted squared error of ``center + zero_row`` in place of rows: float64 [..., D] to [..., segments]."""
        length = zero_row.square().sum(-1, keepdim=True)
        return (self.squares - 2 * zero_row @ self.sums.T + length * self.weights).clamp_(min=0)

    def allocations(self, prices: Sequence[float], kinds: Sequence[int] | None = None) -> list[list[Allocation]]:
        """For each price and kind the least error + price * bytes of rows that alternating minimization finds.

        Step sizes and the 0-bit row are fitted to the segments that have them, then widths to step sizes, and so on.
        That ends in a local minimum: each price also starts from what was found at both its neighbours.

        Args:
            prices (Sequence[float]): weighted squared errors that a byte is worth, falling.
            kinds (Optional[Sequence[int]]): numbers in :data:`KINDS`; None: all.
        """
        kinds = range(len(KINDS)) if kinds is None else kinds
        found: list[_Minimum] = []
        for price in prices:
            best = self._minimize(price, kinds, None)
            found.append(best.or_better(self._minimize(price, kinds, found[-1].bits)) if found else best)
        for k in range(len(prices) - 2, -1, -1):
            found[k] = found[k].or_better(self._minimize(prices[k], kinds, found[k + 1].bits))
        return [self._of_kinds(best, kinds) for best in found]

    def _minimize(self, price: float, kinds: Sequence[int], bits: Tensor | None) -> "_Minimum":
        shifts, segments = len(self._shifts), len(self.squares)
        cost = price * self._payload + _FORBIDDEN[list(kinds)].view(-1, 1, 1, MAX_BITS + 1)  # [kinds, 1, S, 9]
        step = self._errors.sum(1).argmin(2).expand(len(kinds), -1, -1)  # [kinds, H, 8]
        if bits is None:
            # Each segment has the step size that suits itself.
            zero = self._zero_bit_errors(self.zero_rows(torch.ones(segments, dtype=torch.float64)))
            own = torch.cat([zero.view(1, -1, 1).expand(shifts, -1, 1), self._errors.amin(3)], 2)
            bits = (own + cost).argmin(3)  # [kinds, H, S]
        for _ in range(_ROUNDS):
            has = torch.nn.functional.one_hot(bits, MAX_BITS + 1).double()  # [kinds, H, S, 9]
            summed = torch.einsum("khsb,hsba->khba", has[..., 1:], self._errors)
            step = torch.where(has[..., 1:].sum(2) > 0, summed.argmin(3), step)
            index = step.view(len(kinds), shifts, 1, MAX_BITS, 1).expand(-1, -1, segments, -1, -1)
            quantized = self._errors.expand(len(kinds), -1, -1, -1, -1).gather(4, index).squeeze(4)
            zero = self._zero_bit_errors(self.zero_rows((bits == 0).double()))
            errors = torch.cat([zero.unsqueeze(3), quantized], 3)
            following = (errors + cost).argmin(3)
            if torch.equal(following, bits):
                break
            bits = following
        value = (errors + cost).gather(3, bits.unsqueeze(3)).sum((2, 3))
        return _Minimum(bits, step, errors, value)

    def _of_kinds(self, best: "_Minimum", kinds: Sequence[int]) -> list[Allocation]:
        found: list[Allocation] = []
        for k, h in enumerate(best.value.argmin(1).tolist()):
            bits = tuple(best.bits[k, h].tolist())
            if bits not in self._bytes:
                self._bytes[bits] = self.total_bytes(self.bounds, bits)
            alpha = torch.zeros(MAX_BITS + 1, dtype=torch.float64)
            alpha[1:] = self._steps.gather(1, best.step[k, h].unsqueeze(1))[:, 0]
            errors, shift = best.errors[k, h].clone(), float(self._shifts[h])
            found.append(Allocation(self.bounds, bits, errors, KINDS[kinds[k]], alpha, shift, self._bytes[bits]))
        return found

    def changes(self, allocation: Allocation, wider: bool) -> Tensor:
        """Error saved a byte that wider segments add, or error added a byte that narrower ones save.

        Returns:
            Tensor: float64 [segments, 9], for rows alone, without directory; NaN where there is no such change.
        """
        rows = torch.tensor(allocation.bounds, dtype=torch.float64).diff().unsqueeze(1)
        bits = torch.tensor(allocation.bits).unsqueeze(1)
        saved = allocation.errors.gather(1, bits) - allocation.errors
        added = rows * (self._row_bytes - self._row_bytes[bits])
        forbidden = torch.ones(MAX_BITS + 1, dtype=torch.bool)
        forbidden[list(allocation.allowed)] = False
        forbidden = forbidden | ((added <= 0) | (saved <= 0) if wider else added >= 0)
        return (saved / added).masked_fill(forbidden, math.nan)

    def change(self, allocation: Allocation, segment: int, bits: int, rows: int | None = None) -> Allocation:
        """The allocation with a segment, or its first ``rows``, at another width."""
        bounds, widths, errors = list(allocation.bounds), list(allocation.bits), allocation.errors
        first, stop = bounds[segment : segment + 2]
        if rows is not None and rows < stop - first:
            share = rows / (stop - first)
            row = errors[segment : segment + 1]
            errors = torch.cat([errors[:segment], share * row, (1 - share) * row, errors[segment + 1 :]])
            bounds.insert(segment + 1, first + rows)
            widths.insert(segment, bits)
        else:
            widths[segment] = bits
        return replace(
            allocation,
            bounds=tuple(bounds),
            bits=tuple(widths),
            errors=errors,
            total_bytes=self.total_bytes(bounds, widths),
        )

    def scales(self, allocation: Allocation) -> TableScales:
        """Step sizes between those that were tried, offset and 0-bit row that suit an allocation's segments best."""
        starts = torch.tensor(self.bounds[1:-1])
        rows = torch.tensor(self.bounds).diff()
        share = torch.zeros(MAX_BITS + 1, len(rows), dtype=torch.float64)  # of a segment's rows at each width
        for (first, stop), bits in zip(pairwise(allocation.bounds), allocation.bits, strict=True):
            segment = int(torch.searchsorted(starts, first, right=True))
            share[bits, segment] += (stop - first) / rows[segment]
        errors = self._errors[self._shifts.tolist().index(allocation.shift)]
        alpha = allocation.alpha.clone()
        for b in range(1, MAX_BITS + 1):
            summed = share[b] @ errors[:, b - 1]
            k = int(summed.argmin())
            if not bool(share[b].any()) or k in (0, _STEP_SIZES - 1):
                continue
            # The lowest point of the parabola through the best step size and its neighbours.
            before, least, after = summed[k - 1 : k + 2].tolist()
            bend = before - 2 * least + after
            offset = (before - after) / (2 * bend) if bend > 0 else 0.0
            ratio = float(self._steps[b - 1, 1] / self._steps[b - 1, 0])
            alpha[b] = self._steps[b - 1, k] * ratio**offset
        zero_row = (self.center + self.zero_rows(share[0])).float() if self._zero_row else None
        return TableScales(alpha.float(), (self.center + allocation.shift).float(), zero_row)
