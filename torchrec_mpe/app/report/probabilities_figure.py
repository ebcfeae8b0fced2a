"""Searched probabilities: frequency groups by candidate bit-widths, a panel per field."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from torchrec_mpe.app.report.style import field_label, grid_columns, new_figure, probability_colours, short_ticks


def probabilities_figure(fields: Mapping[str, tuple[tuple[int, ...], Tensor]], candidates: Sequence[int]) -> Figure:
    """A heat map per field of one method: order of frequency across, candidate bit-width up, probability as colour."""
    columns = grid_columns(len(fields), 5)
    rows = -(-len(fields) // columns)
    figure = new_figure(8.0, max(2.6, 1.25 * rows + 0.9 if columns > 2 else 2.2 * rows + 0.9))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    scale = Normalize(0.0, 1.0)
    every = 1 if columns <= 2 or len(candidates) <= 4 else 2
    for panel, (table, (bounds, probabilities)) in zip(panels, fields.items(), strict=False):
        edges = 1 + np.asarray(bounds)
        values = np.ma.masked_invalid(probabilities.detach().cpu().double().numpy().T)
        panel.set_facecolor("#bbbbbb")
        panel.pcolormesh(
            edges, np.arange(len(candidates) + 1) - 0.5, values, cmap=probability_colours(), norm=scale, linewidth=0
        )
        panel.set_xscale("log")
        panel.set_xlim(1, max(2.0, float(edges[-1])))
        panel.set_yticks(range(0, len(candidates), every), [str(bits) for bits in candidates[::every]])
        panel.set_title(field_label(table, columns), pad=3)
        short_ticks(panel, bounds[-1])
    for panel in panels[len(fields) :]:
        panel.set_visible(False)
    colours = ScalarMappable(scale, probability_colours())
    bar = figure.colorbar(colours, ax=panels.tolist(), fraction=0.03, aspect=30, shrink=min(1.0, 4.0 / rows))
    bar.set_label("probability")
    figure.supxlabel("row in the order of frequency (1 = most frequent)", fontsize=9)
    figure.supylabel("candidate bit-width", fontsize=9)
    return figure
