"""Bit-width by frequency: a panel per field, and the share of rows of each width by frequency decade."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from torchrec_mpe.app.report.data import unique
from torchrec_mpe.app.report.numerals import short_count
from torchrec_mpe.app.report.style import (
    MethodStyle,
    label,
    new_figure,
    order_axis,
    order_panels,
    width_colour,
)
from torchrec_mpe.packing.bit_widths import MAX_BITS, TableBitWidths

METHODS_A_FIGURE = 4
_DECADES = (0, *(10**power for power in range(18)))  # the lowest count of each


def width_by_order_figure(
    plans: Mapping[str, Mapping[str, TableBitWidths]], styles: Mapping[str, MethodStyle]
) -> Figure:
    """A small panel per field: bit-width against the order of frequency, a step line per method."""
    tables = unique(table for widths in plans.values() for table in widths)
    figure, panels, _ = order_panels(tables)
    top = max((max(widths.bits) for fields in plans.values() for widths in fields.values()), default=0)
    for table, panel in panels.items():
        size = 1
        for number, (method, fields) in enumerate(plans.items()):
            if table not in fields:
                continue
            widths = fields[table]
            size = max(size, widths.num_embeddings)
            runs = widths.runs()
            edges = [1 + first for first, _ in runs] + [1 + widths.num_embeddings]
            # Equal widths of several methods would hide each other: shift each by a hair.
            shift = 0.16 * (number - (len(plans) - 1) / 2)
            heights = [bits + shift for _, bits in runs]
            panel.stairs(heights, edges, baseline=None, color=styles[method].colour, lw=1.3, ls=styles[method].dash)
        order_axis(panel, 0.9, max(2.0, (size + 1) * 1.1), size)
        panel.set_ylim(-0.5, max(top, 2) + 0.6)
        panel.set_yticks(range(0, max(top, 2) + 1, 2))
        panel.grid(True, axis="y")
    figure.supylabel("bits per element", fontsize=9)
    if len(plans) > 1:
        handles = [Line2D([], [], color=styles[m].colour, ls=styles[m].dash, lw=2) for m in plans]
        names = [label(method, 30) for method in plans]
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 3), frameon=False)
    return figure


def frequency_decades(counts: Tensor) -> Tensor:
    """0 for a count of 0, 1 for 1 to 9, 2 for 10 to 99 and so on: uint8 of the shape of ``counts``."""
    return torch.bucketize(counts.detach().cpu().long(), torch.tensor(_DECADES[1:]), right=True).to(torch.uint8)


def width_shares(
    plan: Mapping[str, TableBitWidths], decades: Mapping[str, Tensor]
) -> tuple[list[int], list[list[int]]] | None:
    """Rows of each bit-width by frequency decade, over all tables whose decades are known.

    Args:
        plan (Mapping[str, TableBitWidths]): table -> bit-widths.
        decades (Mapping[str, Tensor]): table -> uint8 [num_embeddings] from :func:`frequency_decades`.

    Returns:
        Optional[tuple[list[int], list[list[int]]]]: the lowest count of each decade (0, 1, 10, 100, ...) and, per
        decade, 9 numbers of rows; None if no table has counts.
    """
    rows = torch.zeros(len(_DECADES) * (MAX_BITS + 1), dtype=torch.int64)
    seen = False
    for table, widths in plan.items():
        if table in decades:
            seen = True
            # At most 19 decades of 9 widths, so a cell's number fits uint8.
            cell = decades[table] * (MAX_BITS + 1) + widths.of_rows().cpu()
            rows += torch.bincount(cell, minlength=len(rows))
    if not seen:
        return None
    table_rows: list[list[int]] = rows.view(len(_DECADES), MAX_BITS + 1).tolist()
    filled = [i for i, decade_rows in enumerate(table_rows) if any(decade_rows)]
    kept = range(min(filled), max(filled) + 1)
    return [_DECADES[i] for i in kept], [table_rows[i] for i in kept]


def width_shares_figure(
    plans: Mapping[str, Mapping[str, TableBitWidths]], counts: Mapping[str, Tensor]
) -> Figure | None:
    """A panel per method: for each frequency decade, the share of its rows that has each bit-width."""
    tables = {table for plan in plans.values() for table in plan}
    decades = {table: frequency_decades(of_rows) for table, of_rows in counts.items() if table in tables}
    shares = {method: found for method, plan in plans.items() if (found := width_shares(plan, decades)) is not None}
    if not shares:
        return None
    columns = 1 if len(shares) == 1 else 2 if len(shares) <= 4 else 3
    lines = -(-len(shares) // columns)
    figure = new_figure(8.0 if columns > 1 else 6.0, 2.3 * lines + 1.1)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for panel, (method, (starts, rows)) in zip(panels, shares.items(), strict=False):
        small = 8.0 if columns < 3 else 7.5 if len(rows) <= 7 else 6.2
        totals = np.array([sum(decade) for decade in rows])
        bottom = np.zeros(len(rows))
        for bits in range(MAX_BITS + 1):
            share = np.array([decade[bits] for decade in rows]) / np.maximum(totals, 1) * 100
            panel.bar(range(len(rows)), share, 0.86, bottom, color=width_colour(bits), edgecolor="white", lw=0.4)
            bottom += share
        for x, total in enumerate(totals):
            panel.text(x, 102, short_count(int(total)), ha="center", va="bottom", fontsize=small, color="#555555")
        panel.set_xticks(range(len(rows)), [short_count(start) for start in starts], fontsize=small)
        panel.set_ylim(0, 114)
        panel.set_yticks([0, 25, 50, 75, 100])
        panel.set_title(label(method, 36), pad=4)
    for panel in panels[len(shares) :]:
        panel.set_visible(False)
    figure.supxlabel("how often the row was seen in training: 0, from 1 to 9, from 10 to 99, ...", fontsize=9)
    figure.supylabel("share of rows, %", fontsize=9)
    used = [bits for bits in range(MAX_BITS + 1) if any(d[bits] for _, rows in shares.values() for d in rows)]
    handles = [Patch(color=width_colour(bits)) for bits in used]
    names = [f"{bits} bit{'' if bits == 1 else 's'}" for bits in used]
    figure.legend(handles, names, loc="outside upper center", ncols=9 if columns > 1 else 5, frameon=False)
    return figure
