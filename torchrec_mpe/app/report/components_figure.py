"""The bits of components by frequency: a panel per field."""

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from torchrec_mpe.app.report.style import order_axis, order_panels, width_colour
from torchrec_mpe.ops.reference.run_coding import COMPONENT_BLOCKS, component_bits
from torchrec_mpe.packing.bit_widths import MAX_BITS
from torchrec_mpe.packing.layout import TableLayout


def components_figure(layouts: Mapping[str, TableLayout]) -> Figure:
    """A panel per field: for the rows in the order of frequency, a bar a block of components, coloured by its width.

    A group of plain rows is one bar over the whole height, its components being all elements. Panels have one height:
    a table with fewer components than others leaves the upper part empty.
    """
    figure, panels, _ = order_panels(list(layouts))
    used: set[int] = set()
    most = max((layout.components or 1 for layout in layouts.values()), default=1)
    blocks = [(first, min(stop, most)) for first, stop in COMPONENT_BLOCKS if first < most]
    names = [f"{first}" if stop == first + 1 else f"{first}-{stop - 1}" for first, stop in blocks]
    top = len(blocks)
    for table, panel in panels.items():
        layout = layouts[table]
        components = layout.components or 0
        for run in layout.runs:
            left, width = 1 + run.first, run.rows
            if run.is_transformed:
                bits = component_bits(run.coding, components)
                for height, (first, _) in enumerate(blocks):
                    if first >= components:
                        break
                    used.add(bits[first])
                    colour = width_colour(bits[first])
                    panel.bar(left, 1, width, height, align="edge", color=colour, edgecolor="white", lw=0.2)
            else:
                used.add(run.bits)
                panel.bar(left, top, width, 0, align="edge", color=width_colour(run.bits), hatch="//", ec="white", lw=0)
        order_axis(panel, 0.9, max(2.0, (layout.num_embeddings + 1) * 1.1), layout.num_embeddings)
        panel.set_ylim(0, top)
        panel.set_yticks([place + 0.5 for place in range(top)], names, fontsize=6.5)
    figure.supylabel("component", fontsize=9)
    shown = [bits for bits in range(MAX_BITS + 1) if bits in used]
    handles = [Patch(color=width_colour(bits)) for bits in shown]
    handles.append(Patch(facecolor="#bbbbbb", hatch="//", edgecolor="white"))
    labels = [*(f"{bits} bit{'' if bits == 1 else 's'}" for bits in shown), "plain rows"]
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    return figure
