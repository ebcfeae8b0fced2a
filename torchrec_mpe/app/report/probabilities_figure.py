"""Searched probabilities: frequency groups by candidate bit-widths, a panel per field."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from torchrec_mpe.app.report.style import order_axis, order_panels, probability_colours


def probabilities_figure(fields: Mapping[str, tuple[tuple[int, ...], Tensor]], candidates: Sequence[int]) -> Figure:
    """A heat map per field of one method: order of frequency across, candidate bit-width up, probability as colour."""
    figure, panels, columns = order_panels(list(fields))
    rows = -(-len(fields) // columns)
    scale = Normalize(0.0, 1.0)
    every = 1 if columns <= 2 or len(candidates) <= 4 else 2
    for table, (bounds, probabilities) in fields.items():
        panel = panels[table]
        edges = 1 + np.asarray(bounds)
        values = np.ma.masked_invalid(probabilities.detach().cpu().double().numpy().T)
        panel.set_facecolor("#bbbbbb")
        panel.pcolormesh(
            edges, np.arange(len(candidates) + 1) - 0.5, values, cmap=probability_colours(), norm=scale, linewidth=0
        )
        order_axis(panel, 1, max(2.0, float(edges[-1])), bounds[-1])
        panel.set_yticks(range(0, len(candidates), every), [str(bits) for bits in candidates[::every]])
    colours = ScalarMappable(scale, probability_colours())
    bar = figure.colorbar(colours, ax=figure.axes, fraction=0.03, aspect=30, shrink=min(1.0, 4.0 / rows))
    bar.set_label("probability")
    figure.supylabel("candidate bit-width", fontsize=9)
    return figure
