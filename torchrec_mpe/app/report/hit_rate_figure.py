"""Hit rates of caches by step."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from torchrec_mpe.app.report.data import unique
from torchrec_mpe.app.report.numerals import short_count
from torchrec_mpe.app.report.style import COLOURS, FAINT, label, new_figure
from torchrec_mpe.cache.statistics import CacheStatistics

NAMED_TABLES = 6
_METHODS_A_ROW = 2


def hit_rate_figure(curves: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel per method: the hit rate of its tables in every window of steps, phase after phase, of the first seed.

    Of more than six tables, those that miss most have lines of their own, beside that of all tables.
    """
    methods = unique(str(curve["method"]) for curve in curves)
    columns = min(_METHODS_A_ROW, len(methods))
    blocks = -(-len(methods) // columns)
    figure = new_figure(8.0, 2.6 * blocks + 0.3)
    panels = figure.subplots(blocks, columns, sharey=True, squeeze=False)
    for number, method in enumerate(methods):
        axes = panels[number // columns][number % columns]
        mine = [curve for curve in curves if str(curve["method"]) == method]
        steps, windows, starts = _joined([curve for curve in mine if curve["seed"] == mine[0]["seed"]])
        for start in starts[1:]:
            axes.axvline(start, color=FAINT, lw=0.8, ls=(0, (2, 2)), zorder=1)
        for k, table in enumerate(_missing_most(windows)):
            rates = [window[table].hit_rate for window in windows]
            axes.plot(steps, rates, color=COLOURS[1 + k % (len(COLOURS) - 1)], lw=1.0, label=label(table, 20))
        rates = [sum(window.values(), CacheStatistics()).hit_rate for window in windows]
        axes.plot(steps, rates, color=COLOURS[0], lw=1.8, label="all tables", marker="o" if len(steps) == 1 else "")
        axes.set_title(label(method, 40), pad=4)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(True, axis="y")
        axes.set_xlabel("step")
        axes.set_ylabel("hit rate" if number % columns == 0 else "")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value) if value >= 0 else ""))
        axes.legend(loc="best", frameon=False, ncols=2)
    for number in range(len(methods), blocks * columns):
        panels[number // columns][number % columns].set_visible(False)
    return figure


def _joined(
    phases: Sequence[Mapping[str, Any]],
) -> tuple[list[int], list[dict[str, CacheStatistics]], list[int]]:
    """Steps counted over all phases, what was counted in the windows that end there, and the phases' first steps."""
    steps: list[int] = []
    windows: list[dict[str, CacheStatistics]] = []
    starts: list[int] = []
    for phase in phases:
        start = steps[-1] if steps else 0
        starts.append(start)
        steps += [start + step for step in phase["steps"]]
        windows += phase["caches"]
    return steps, windows, starts


def _missing_most(windows: Sequence[Mapping[str, CacheStatistics]]) -> list[str]:
    """The tables that get lines of their own, in the tables' order."""
    tables = list(windows[0]) if windows else []
    misses = {table: sum(window[table].num_unique_misses for window in windows) for table in tables}
    chosen = set(sorted(tables, key=lambda table: -misses[table])[:NAMED_TABLES])
    return [table for table in tables if table in chosen]
