"""Bit-width by frequency: a panel per field, and the share of rows of each width by frequency decade."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from torchrec_mpe.bit_widths import MAX_BITS, TableBitWidths
from torchrec_mpe.report.data import unique
from torchrec_mpe.report.numerals import short_count
from torchrec_mpe.report.style import FAINT, MethodStyle, grid_columns, label, new_figure, short_ticks, width_colour

METHODS_A_FIGURE = 4


def width_by_rank_figure(
    plans: Mapping[str, Mapping[str, TableBitWidths]], styles: Mapping[str, MethodStyle]
) -> Figure:
    """A small panel per field: bit-width against frequency rank, a step line per method."""
    tables = unique(table for widths in plans.values() for table in widths)
    columns = grid_columns(len(tables), 5)
    rows = -(-len(tables) // columns)
    figure = new_figure(8.0, max(2.6, 1.25 * rows + 0.9 if columns > 2 else 2.2 * rows + 0.9))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    top = max((max(widths.bits) for fields in plans.values() for widths in fields.values()), default=0)
    for panel, table in zip(panels, tables, strict=False):
        size = 1
        for number, (method, fields) in enumerate(plans.items()):
            if table not in fields:
                continue
            widths = fields[table]
            size = max(size, widths.num_embeddings)
            runs = widths.runs()
            edges = [1 + first for first, _ in runs] + [1 + widths.num_embeddings]
            # Equal widths of several methods would hide each other: shift each by a hair.
            shift = 0.13 * (number - (len(plans) - 1) / 2)
            heights = [bits + shift for _, bits in runs]
            panel.stairs(heights, edges, baseline=None, color=styles[method].colour, lw=1.5, ls=styles[method].dash)
        panel.set_xscale("log")
        panel.set_xlim(0.9, max(2.0, (size + 1) * 1.1))
        panel.set_ylim(-0.5, max(top, 2) + 0.6)
        panel.set_yticks(range(0, max(top, 2) + 1, 2))
        panel.grid(True, axis="y")
        panel.set_title(label(table, 22 if columns > 3 else 34), pad=3)
        short_ticks(panel, size)
    for panel in panels[len(tables) :]:
        panel.set_visible(False)
    figure.supxlabel("frequency rank of the row (1 = most frequent)", fontsize=9)
    figure.supylabel("bits per element", fontsize=9)
    if len(plans) > 1:
        handles = [Line2D([], [], color=styles[m].colour, ls=styles[m].dash, lw=2) for m in plans]
        names = [label(method, 30) for method in plans]
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 3), frameon=False)
    return figure


def width_shares(
    plan: Mapping[str, TableBitWidths], counts: Mapping[str, Tensor]
) -> tuple[list[int], list[list[int]]] | None:
    """Rows of each bit-width by frequency decade, over all tables that have counts.

    Returns:
        Optional[tuple[list[int], list[list[int]]]]: the lowest count of each decade (0, 1, 10, 100, ...) and, per decade,
        9 numbers of rows; None if no table has counts.
    """
    starts = [0] + [10**power for power in range(18)]
    rows = torch.zeros(len(starts) * (MAX_BITS + 1), dtype=torch.int64)
    seen = False
    for table, widths in plan.items():
        if table in counts:
            seen = True
            decade = torch.bucketize(counts[table].cpu().long(), torch.tensor(starts[1:]), right=True)
            cell = decade * (MAX_BITS + 1) + widths.of_rows().cpu().long()
            rows += torch.bincount(cell, minlength=len(rows))
    if not seen:
        return None
    table_rows: list[list[int]] = rows.view(len(starts), MAX_BITS + 1).tolist()
    filled = [i for i, decade_rows in enumerate(table_rows) if any(decade_rows)]
    kept = range(min(filled), max(filled) + 1)
    return [starts[i] for i in kept], [table_rows[i] for i in kept]


def width_shares_figure(
    plans: Mapping[str, Mapping[str, TableBitWidths]], counts: Mapping[str, Tensor]
) -> Figure | None:
    """A panel per method: for each frequency decade, the share of its rows that has each bit-width."""
    shares = {method: found for method, plan in plans.items() if (found := width_shares(plan, counts)) is not None}
    if not shares:
        return None
    columns = 1 if len(shares) == 1 else 2 if len(shares) <= 4 else 3
    lines = -(-len(shares) // columns)
    figure = new_figure(8.0 if columns > 1 else 6.0, 2.3 * lines + 1.1)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for panel, (method, (starts, rows)) in zip(panels, shares.items(), strict=False):
        totals = np.array([sum(decade) for decade in rows])
        bottom = np.zeros(len(rows))
        for bits in range(MAX_BITS + 1):
            share = np.array([decade[bits] for decade in rows]) / np.maximum(totals, 1) * 100
            panel.bar(range(len(rows)), share, 0.86, bottom, color=width_colour(bits), edgecolor="white", lw=0.4)
            bottom += share
        for x, total in enumerate(totals):
            size = 7.5 if columns < 3 or len(rows) < 8 else 6.5
            panel.text(x, 102, short_count(int(total)), ha="center", va="bottom", fontsize=size, color=FAINT)
        panel.set_xticks(range(len(rows)), _decade_names(starts), fontsize=7.5 if columns == 3 else 8)
        panel.set_ylim(0, 114)
        panel.set_yticks([0, 25, 50, 75, 100])
        panel.set_title(label(method, 36), pad=4)
    for panel in panels[len(shares) :]:
        panel.set_visible(False)
    figure.supxlabel("times the row was seen in training (0, 1 to 9, 10 to 99, ...)", fontsize=9)
    figure.supylabel("share of rows, %", fontsize=9)
    used = [bits for bits in range(MAX_BITS + 1) if any(d[bits] for _, rows in shares.values() for d in rows)]
    handles = [Patch(color=width_colour(bits)) for bits in used]
    names = [f"{bits} bit{'' if bits == 1 else 's'}" for bits in used]
    figure.legend(handles, names, loc="outside upper center", ncols=9 if columns > 1 else 5, frameon=False)
    return figure


def _decade_names(starts: Sequence[int]) -> list[str]:
    """``0``, ``1+``, ``10+``, ``100+``, ``1k+``."""
    return ["0" if start == 0 else f"{short_count(start)}+" for start in starts]
