"""Bit-widths of all tables under a byte budget, or of one under a bound of its error."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_mpe.packing.bit_widths import MAX_BITS
from torchrec_mpe.packing.size import packed_bytes
from torchrec_mpe.precision.table_widths import KINDS, Allocation, TableCandidates

_PRICES = 48
_BISECTIONS = 8  # between two neighbouring prices
_SWEEPS = 4
_CLOSE = 0.002  # of the budget

Size = Callable[[Mapping[str, Allocation]], int]


@dataclass(frozen=True)
class Curves:
    """Error against bytes of one table, for each kind of widths, by falling price of a byte.

    Attributes:
        allocations (list[list[Allocation]]): by kind, then price.
        errors (Tensor): float64 [kinds, prices], never increasing.
        bytes (Tensor): float64 [kinds, prices], never decreasing.
    """

    allocations: list[list[Allocation]]
    errors: Tensor
    bytes: Tensor


def allocate_under_budget(
    tables: Sequence[TableCandidates], budget: int, learned_zero_rows: bool
) -> dict[str, Allocation]:
    """A small weighted squared error, summed over tables, of packed tables of at most ``budget`` bytes.

    One price of a byte for all tables (Lagrange's multiplier) finds their widths, given the kind of widths, and so of
    directory, of each table. Kinds are improved one table at a time. What the last step of the price leaves over is
    spent on the segments that gain most a byte, the last of them in part.

    Args:
        tables (Sequence[TableCandidates]): in the collection's order.
        budget (int): bytes of rows, directories, scales, 0-bit rows and padding.
        learned_zero_rows (bool): tables store what their 0-bit rows read.

    Raises:
        ValueError: saying what is reached, if the tables without any bits are larger.
    """

    def size(allocations: Mapping[str, Allocation]) -> int:
        widths = {t.name: t.widths(allocations[t.name].bounds, allocations[t.name].bits) for t in tables}
        return packed_bytes(widths, shared_scales=False, learned_zero_rows=learned_zero_rows).total

    prices = _prices(tables)
    curves = [_curves(t, prices) for t in tables]
    smallest = {t.name: c.allocations[int(c.bytes[:, 0].argmin())][0] for t, c in zip(tables, curves, strict=True)}
    least = size(smallest)
    if least > budget:
        fp32 = sum(4 * t.bounds[-1] * t.embedding_dim for t in tables)
        raise ValueError(
            f"a budget of {budget:,} bytes cannot be met: without any bits the tables take {least:,} bytes "
            f"({fp32 / least:.1f}x)"
        )
    shared = least - sum(a.total_bytes for a in smallest.values())
    kinds, step = _choose_kinds(curves, prices, budget - shared)
    small = {t.name: c.allocations[k][step] for t, c, k in zip(tables, curves, kinds, strict=True)}
    starts: list[dict[str, Allocation] | None] = [small]
    if step + 1 < len(prices):
        large = {t.name: c.allocations[k][step + 1] for t, c, k in zip(tables, curves, kinds, strict=True)}
        low, high = math.log(prices[step + 1]), math.log(prices[step])
        for _ in range(_BISECTIONS):
            price = math.exp((low + high) / 2)
            middle: dict[str, Allocation] = {}
            for t, k in zip(tables, kinds, strict=True):
                options = [*t.allocations([price], [k])[0], small[t.name], large[t.name]]
                middle[t.name] = min(options, key=lambda a: a.error + price * a.total_bytes)
            reached = size(middle)
            if reached > budget:
                low, large = math.log(price), middle
            else:
                high, small = math.log(price), middle
                if reached >= (1 - _CLOSE) * budget:
                    break
        # Bytes can jump by much between two prices: the way to the budget from either side is tried.
        starts += [small, _trim(tables, large, budget, size)]
    spent = [_spend(tables, start, budget, size) for start in starts if start is not None and size(start) <= budget]
    return min(spent or [smallest], key=lambda found: sum(a.error for a in found.values()))


def curves_of(table: TableCandidates) -> Curves:
    """Error against bytes of one table, over all prices that matter to it."""
    return _curves(table, _prices([table]))


def allocate_under_error(table: TableCandidates, curves: Curves, bound: float) -> Allocation | None:
    """The fewest bytes found of a table with a weighted squared error within ``bound``; None if 8 bits exceed it."""
    best: Allocation | None = None
    for allocations, errors in zip(curves.allocations, curves.errors.tolist(), strict=True):
        within = next((k for k, error in enumerate(errors) if error <= bound), None)
        if within is None:
            continue
        options = [allocations[within]]
        if within:
            options.append(_reach(table, allocations[within - 1], bound))
        for option in options:
            if option.error <= bound and (best is None or option.total_bytes < best.total_bytes):
                best = option
    return best


def _prices(tables: Sequence[TableCandidates]) -> list[float]:
    """From a price at which no row is worth a bit to one at which all are worth 8, falling."""
    rates = torch.cat([t.squares / torch.tensor(t.bounds, dtype=torch.float64).diff() for t in tables])
    rates = rates[rates > 0]
    if not len(rates):
        return [1.0]
    high, low = 10 * float(rates.max()), 1e-3 * 4.0**-MAX_BITS * float(rates.min())
    return torch.logspace(math.log10(high), math.log10(low), _PRICES, dtype=torch.float64).tolist()


def _curves(table: TableCandidates, prices: Sequence[float]) -> Curves:
    mixed, alone = ([k for k, kind in enumerate(KINDS) if (len(kind) == 1) is one] for one in (False, True))
    found = [list(of_kind) for of_kind in zip(*table.allocations(prices, mixed), strict=True)]
    # Where there is one width the price changes nothing.
    found += [[of_kind] * len(prices) for of_kind in table.allocations(prices[:1], alone)[0]]
    errors = torch.tensor([[a.error for a in of_kind] for of_kind in found], dtype=torch.float64)
    sizes = torch.tensor([[a.total_bytes for a in of_kind] for of_kind in found], dtype=torch.float64)
    # What was found at one price may be better at another than what was found there.
    value = errors.unsqueeze(1) + torch.tensor(prices, dtype=torch.float64).view(1, -1, 1) * sizes.unsqueeze(1)
    best = value.argmin(2)
    allocations = [[found[k][p] for p in of_kind] for k, of_kind in enumerate(best.tolist())]
    return Curves(allocations, errors.gather(1, best), sizes.gather(1, best))


def _choose_kinds(curves: Sequence[Curves], prices: Sequence[float], budget: float) -> tuple[list[int], int]:
    """The kind of each table, and the number of the last price at which they meet the budget."""
    price = torch.tensor(prices, dtype=torch.float64)
    best = [(c.errors + price * c.bytes).argmin(0) for c in curves]  # [prices]
    total = sum(c.bytes.gather(0, b.unsqueeze(0))[0] for c, b in zip(curves, best, strict=True))
    met = int((total <= budget).sum()) - 1 if isinstance(total, Tensor) else 0
    kinds = [int(b[max(met, 0)]) for b in best]
    errors = torch.stack([c.errors[k] for c, k in zip(curves, kinds, strict=True)]).sum(0)
    sizes = torch.stack([c.bytes[k] for c, k in zip(curves, kinds, strict=True)]).sum(0)
    for _ in range(_SWEEPS):
        before = list(kinds)
        for t, c in enumerate(curves):
            rest = errors - c.errors[kinds[t]], sizes - c.bytes[kinds[t]]
            kinds[t] = int(_error_at(rest[0] + c.errors, rest[1] + c.bytes, budget).argmin())
            errors, sizes = rest[0] + c.errors[kinds[t]], rest[1] + c.bytes[kinds[t]]
        if kinds == before:
            break
    return kinds, max(int((sizes <= budget).sum()) - 1, 0)


def _error_at(errors: Tensor, sizes: Tensor, budget: float) -> Tensor:
    """The error at exactly the budget, between the points of curves [kinds, prices]: float64 [kinds]."""
    last = (sizes <= budget).sum(1, keepdim=True) - 1
    following = (last + 1).clamp(max=sizes.shape[1] - 1)
    first = last.clamp(min=0)
    low, high = sizes.gather(1, first), sizes.gather(1, following)
    share = torch.where(high > low, (budget - low) / (high - low).clamp(min=1e-300), 0.0)
    error = errors.gather(1, first) + share * (errors.gather(1, following) - errors.gather(1, first))
    return torch.where(last < 0, math.inf, error)[:, 0]


def _reach(table: TableCandidates, allocation: Allocation, bound: float) -> Allocation:
    """Widen segments, those that save most error a byte first, until the error is within the bound or no row can."""
    while allocation.error > bound:
        rates = table.changes(allocation, wider=True).nan_to_num(0.0)
        segment, bits = divmod(int(rates.argmax()), MAX_BITS + 1)
        gain = float(allocation.errors[segment, allocation.bits[segment]] - allocation.errors[segment, bits])
        if float(rates[segment, bits]) <= 0:
            break
        rows = allocation.bounds[segment + 1] - allocation.bounds[segment]
        needed = math.ceil((allocation.error - bound) / gain * rows)
        allocation = table.change(allocation, segment, bits, needed if needed < rows else None)
    return allocation


def _spend(
    tables: Sequence[TableCandidates],
    allocations: Mapping[str, Allocation],
    budget: int,
    size: Size,
) -> dict[str, Allocation]:
    """Widen segments, those that save most error a byte first, as far as the budget allows."""
    spent = dict(allocations)
    rates = {t.name: t.changes(spent[t.name], wider=True).nan_to_num(0.0) for t in tables}
    while True:
        best, name, segment, bits = max(
            (float(rate.max()), name, *divmod(int(rate.argmax()), MAX_BITS + 1)) for name, rate in rates.items()
        )
        if best <= 0:
            return spent
        table = next(t for t in tables if t.name == name)
        wider = {**spent, name: table.change(spent[name], segment, bits)}
        if size(wider) <= budget:
            spent = wider
            rates[name] = table.changes(spent[name], wider=True).nan_to_num(0.0)
            continue
        # The first rows of the segment, as many as there are bytes for.
        none, all_rows = 0, spent[name].bounds[segment + 1] - spent[name].bounds[segment]
        while all_rows - none > 1:
            rows = (none + all_rows) // 2
            if size({**spent, name: table.change(spent[name], segment, bits, rows)}) <= budget:
                none = rows
            else:
                all_rows = rows
        return {**spent, name: table.change(spent[name], segment, bits, none)} if none else spent


def _trim(
    tables: Sequence[TableCandidates], allocations: Mapping[str, Allocation], budget: int, size: Size
) -> dict[str, Allocation] | None:
    """Narrow segments, those that cost least error a byte first, until the budget is met; None if it cannot be."""
    trimmed = dict(allocations)
    rates = {t.name: t.changes(trimmed[t.name], wider=False).nan_to_num(math.inf) for t in tables}
    while size(trimmed) > budget:
        best, name, segment, bits = min(
            (float(rate.min()), name, *divmod(int(rate.argmin()), MAX_BITS + 1)) for name, rate in rates.items()
        )
        if best == math.inf:
            return None
        table = next(t for t in tables if t.name == name)
        trimmed[name] = table.change(trimmed[name], segment, bits)
        rates[name] = table.changes(trimmed[name], wider=False).nan_to_num(math.inf)
    return trimmed
