"""Bytes given to groups of rows of many tables where they save most error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchrec_mpe.coding.candidates import GroupChoice, TableCandidates, TableChoice
from torchrec_mpe.coding.size import coded_bytes, collection_bytes

_HIGHEST = 1e9  # times all error: the price at which only bytes matter
_LOWEST = 1e-26
_BISECTIONS = 36
_MERGE_ROUNDS = 2


def allocate(tables: Sequence[TableCandidates], budget: int, reserved: int = 0) -> list[TableChoice]:
    """A coding of every table, in at most ``budget`` bytes together, of which ``reserved`` are for something else.

    One price of a byte for all tables (Lagrange's multiplier) finds kind, widths and components, and at that price
    neighbouring groups are merged. What the last step of the price leaves over is spent on the groups that gain most a
    byte, the last of them in part.

    Raises:
        ValueError: naming the smallest budget.
    """
    prices = _Prices.of(tables)
    smallest = _bytes(tables, [t.choose(prices.highest) for t in tables])
    budget -= reserved
    if smallest > budget:
        fp32 = sum(4 * t.rows * t.dim for t in tables)
        smallest += reserved
        raise ValueError(
            f"a budget of {budget + reserved:,} bytes cannot be met: without any bits the tables take {smallest:,} "
            f"bytes ({fp32 / smallest:.1f}x)"
        )
    for _ in range(_MERGE_ROUNDS):
        met = _meet(tables, budget, prices)
        merged = [t.merge_groups(met.price, t.blocks_of(c)) for t, c in zip(tables, met.within, strict=True)]
        if not any(merged):
            break
    met = _meet(tables, budget, prices)
    starts = {
        tuple(t.blocks_of(c) for t, c in zip(tables, choices, strict=True)) for choices in (met.within, met.above)
    }
    found = [met.within]
    for blocks in sorted(starts):
        if _bytes(tables, [t.choose(prices.highest, b) for t, b in zip(tables, blocks, strict=True)]) <= budget:
            fixed = _meet(tables, budget, prices, blocks)
            found.append(_fill(tables, fixed.within, fixed.above, budget))
    return min(found, key=lambda choices: sum(c.error for c in choices))


@dataclass(frozen=True)
class _Prices:
    """Where to look for the price of a byte."""

    highest: float
    lowest: float

    @classmethod
    def of(cls, tables: Sequence[TableCandidates]) -> "_Prices":
        error = sum(g.levels.energy for t in tables for g in t.groups) or 1.0
        return cls(error * _HIGHEST, error * _LOWEST)


@dataclass(frozen=True)
class _Met:
    """The choices on either side of a budget; the same ones where the lowest price is within it."""

    price: float
    within: list[TableChoice]
    above: list[TableChoice]


def _meet(tables: Sequence[TableCandidates], budget: int, prices: _Prices, blocks: Sequence[int] | None = None) -> _Met:
    """Bisect the price; at the highest the budget is met."""

    def choose(price: float) -> list[TableChoice]:
        return [t.choose(price, None if blocks is None else blocks[k]) for k, t in enumerate(tables)]

    within, above = choose(prices.highest), choose(prices.lowest)
    if _bytes(tables, above) <= budget:
        return _Met(prices.lowest, above, above)
    low, high = math.log(prices.lowest), math.log(prices.highest)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        choices = choose(math.exp(middle))
        if _bytes(tables, choices) > budget:
            low, above = middle, choices
        else:
            high, within = middle, choices
    return _Met(math.exp(high), within, above)


def _bytes(tables: Sequence[TableCandidates], choices: Sequence[TableChoice]) -> int:
    return coded_bytes(t.runs(c) for t, c in zip(tables, choices, strict=True))


def _fill(
    tables: Sequence[TableCandidates], within: Sequence[TableChoice], above: Sequence[TableChoice], budget: int
) -> list[TableChoice]:
    """Give groups of ``within`` their coding of ``above``, the most gain a byte first, as far as the budget allows.

    Args:
        within (Sequence[TableChoice]): in no more bytes than the budget.
        above (Sequence[TableChoice]): of the same groups and components.
    """
    choices = list(within)
    sizes = [t.runs(c).sizes for t, c in zip(tables, choices, strict=True)]
    steps: list[tuple[float, int, GroupChoice, GroupChoice]] = []
    for t, table in enumerate(tables):
        for old, new in zip(within[t].groups, above[t].groups, strict=True):
            more = table.group_bytes(new) - table.group_bytes(old)
            if more > 0 and old.error > new.error:
                steps.append(((old.error - new.error) / more, t, old, new))
    for _, t, old, new in sorted(steps, key=lambda step: -step[0]):

        def fits(rows: int, t: int = t, old: GroupChoice = old, new: GroupChoice = new) -> TableChoice | None:
            """The table with the first rows of the group coded anew, if the budget allows it."""
            middle = old.first + rows
            share = tables[t].weight_share(old, middle)
            split = [new.part(old.first, middle, share)]
            split += [old.part(middle, old.stop, 1 - share)] if middle < old.stop else []
            groups = (part for group in choices[t].groups for part in (split if group is old else [group]))
            choice = TableChoice(choices[t].components, tuple(groups))
            size = tables[t].runs(choice).sizes
            return choice if collection_bytes([*sizes[:t], size, *sizes[t + 1 :]]) <= budget else None

        chosen = fits(old.rows)
        if chosen is None:
            none, all_rows = 0, old.rows
            while all_rows - none > 1:
                rows = (none + all_rows) // 2
                part = fits(rows)
                none, all_rows, chosen = (none, rows, chosen) if part is None else (rows, all_rows, part)
        if chosen is not None:
            choices[t], sizes[t] = chosen, tables[t].runs(chosen).sizes
    return choices
