"""Training loss and validation AUC by step, phase by phase."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from torchrec_mpe.app.report.data import unique
from torchrec_mpe.app.report.numerals import short_count
from torchrec_mpe.app.report.style import MethodStyle, label, new_figure

PHASES_A_ROW = 3


def training_figure(curves: Sequence[Mapping[str, Any]], styles: Mapping[str, MethodStyle]) -> Figure:
    """For every phase the training loss and below it the validation AUC; a colour per method, a line per seed."""
    phases = unique(str(curve["phase"]) for curve in curves)
    methods = unique(str(curve["method"]) for curve in curves)
    validated = any(curve["validation"] for curve in curves)
    kinds = 2 if validated else 1
    columns = min(PHASES_A_ROW, len(phases))
    blocks = -(-len(phases) // columns)
    legend_lines = -(-len(methods) // 3)
    figure = new_figure(8.0, 2.1 * kinds * blocks + 0.22 * legend_lines + 0.5)
    panels = figure.subplots(kinds * blocks, columns, sharey=False, squeeze=False)
    loss_limits, auc_limits = _loss_limits(curves), _auc_limits(curves)
    for number, phase in enumerate(phases):
        block, column = divmod(number, columns)
        loss = panels[block * kinds][column]
        loss.set_title(label(phase, 30), pad=4)
        here = [curve for curve in curves if str(curve["phase"]) == phase]
        for curve in here:
            style = styles[str(curve["method"])]
            loss.plot(curve["steps"], curve["loss"], color=style.colour, ls=style.dash, lw=1.1, alpha=0.8)
            if len(curve["steps"]) == 1:
                loss.plot(curve["steps"], curve["loss"], style.marker, color=style.colour, ms=4)
        _finish(loss, "training log loss" if column == 0 else "", loss_limits, 3)
        if not validated:
            loss.set_xlabel("step")
            continue
        auc = panels[block * kinds + 1][column]
        for curve in here:
            style = styles[str(curve["method"])]
            points = [point for point in curve["validation"] if point["auc"] is not None]
            xs, ys = [point["step"] for point in points], [point["auc"] for point in points]
            auc.plot(xs, ys, color=style.colour, ls=style.dash, marker=style.marker, ms=4, lw=1.1, alpha=0.8, mew=0)
        _finish(auc, "validation AUC" if column == 0 else "", auc_limits, 4)
        auc.set_xlim(loss.get_xlim())
        auc.set_xlabel("step")
    for number in range(len(phases), blocks * columns):
        for kind in range(kinds):
            panels[(number // columns) * kinds + kind][number % columns].set_visible(False)
    handles = [
        Line2D([], [], color=styles[m].colour, ls=styles[m].dash, marker=styles[m].marker, ms=5, lw=1.6)
        for m in methods
    ]
    names = [label(method, 34) for method in methods]
    figure.legend(handles, names, loc="outside upper center", ncols=min(3, len(names)), frameon=False)
    return figure


def _finish(axes: Axes, title: str, limits: tuple[float, float] | None, digits: int) -> None:
    """The vertical label and limits that all phases share, and short steps."""
    axes.set_ylabel(title)
    axes.tick_params(labelleft=bool(title))
    axes.grid(True, axis="y")
    if limits is not None:
        axes.set_ylim(*limits)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{digits}f}"))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value) if value >= 0 else ""))
    axes.margins(x=0.04)


def _spread(values: Sequence[float]) -> tuple[float, float] | None:
    """Limits with a small margin around ``values``; None if there are none."""
    if not values:
        return None
    low, high = min(values), max(values)
    margin = max(0.06 * (high - low), 1e-4)
    return low - margin, high + margin


def _loss_limits(curves: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Limits for every loss panel; each curve's steep first tenth may leave at the top."""
    values = [loss for c in curves for loss in c["loss"][len(c["loss"]) // 10 :] if _finite(loss)]
    return _spread(values)


def _auc_limits(curves: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Limits for every validation panel."""
    return _spread([point["auc"] for curve in curves for point in curve["validation"] if _finite(point["auc"])])


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
