"""Colours, fonts and rendering shared by the figures."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, to_rgb
from matplotlib.figure import Figure

from torchrec_mpe.app.report.data import unique
from torchrec_mpe.packing.bit_widths import MAX_BITS

DPI = 150
INK = "#222222"
FAINT = "#8a8a8a"
# Okabe and Ito's colours without yellow, which vanishes on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)))
# Fonts for names that DejaVu Sans cannot write; used only where they are installed.
FALLBACK_FONTS = ("Noto Sans CJK SC", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans")


@dataclass(frozen=True)
class MethodStyle:
    """How one method is drawn in every figure; no two of the first 56 methods share colour and marker."""

    colour: str
    marker: str
    dash: str | tuple[int, tuple[float, ...]]


def method_styles(methods: Sequence[str]) -> dict[str, MethodStyle]:
    """A style per method."""
    return {
        method: MethodStyle(
            COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[(i // len(COLOURS)) % len(DASHES)]
        )
        for i, method in enumerate(unique(methods))
    }


def darker(colour: str) -> tuple[float, float, float]:
    """``colour`` dark enough for text on white."""
    red, green, blue = to_rgb(colour)
    return (red * 0.68, green * 0.68, blue * 0.68)


def width_colour(bits: int) -> tuple[float, float, float, float]:
    """A colour per bit-width: light grey for rows without bits, darker for more bits."""
    if bits == 0:
        return (0.86, 0.86, 0.86, 1.0)
    red, green, blue, alpha = probability_colours()(1.0 - bits / MAX_BITS)
    return (red, green, blue, alpha)


def probability_colours() -> Colormap:
    """Viridis, perceptually uniform and safe for colour-blind readers."""
    return matplotlib.colormaps["viridis"]


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's defaults plus ours inside the block, whatever the user's own settings."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    ours: Any = {
        "font.family": ["DejaVu Sans", *(font for font in FALLBACK_FONTS if font in installed)],
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.linewidth": 0.8,
        "axes.grid": False,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        # A name may hold dollar signs.
        "text.parse_math": False,
        "text.usetex": False,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(ours)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of ``width`` by ``height`` inches that lays itself out."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same data."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def label(name: str, limit: int) -> str:
    """``name`` on one line of at most ``limit`` characters, with the middle left out if it is longer."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(name.split())) or "(no name)"
    if len(text) > limit:
        tail = (limit - 1) // 3
        text = f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"
    # Matplotlib leaves names that start with an underscore out of legends.
    return f" {text}" if text.startswith("_") else text


def order_panels(tables: Sequence[str]) -> tuple[Figure, dict[str, Axes], int]:
    """A figure with a small panel a table, across which its rows lie in the order of frequency, and its columns."""
    columns = next((columns for columns in range(1, 5) if len(tables) <= columns * (columns + (columns > 2))), 5)
    rows = -(-len(tables) // columns)
    figure = new_figure(8.0, max(2.6, 1.25 * rows + 0.9 if columns > 2 else 2.2 * rows + 0.9))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel, table in zip(panels, tables, strict=False):
        panel.set_title(label(table, {1: 70, 2: 40, 3: 30, 4: 22}.get(columns, 17)), pad=3)
    for panel in panels[len(tables) :]:
        panel.set_visible(False)
    figure.supxlabel("row in the order of frequency (1 = most frequent)", fontsize=9)
    return figure, dict(zip(tables, panels, strict=False)), columns


def order_axis(axes: Axes, low: float, high: float, size: float) -> None:
    """A logarithmic axis of places from 1 to ``size`` with at most four ticks, written short."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from torchrec_mpe.app.report.numerals import short_count

    powers = [10**power for power in range(20) if 10**power <= size]
    step = -(-len(powers) // 4)
    axes.xaxis.set_major_locator(FixedLocator(powers[::step]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
