"""AUC against real bytes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from torchrec_mpe.app.report.estimates import MethodSummary, baseline_method, summarize
from torchrec_mpe.app.report.label_placement import DirectLabel, place_labels
from torchrec_mpe.app.report.numerals import in_bytes
from torchrec_mpe.app.report.style import FAINT, MethodStyle, darker, label, new_figure


def quality_figure(results: Sequence[Mapping[str, Any]], styles: Mapping[str, MethodStyle]) -> Figure | None:
    """A faint point per seed and a labelled mean with its standard error per method; None without a finite AUC."""
    summaries = [one for one in summarize(results) if math.isfinite(one.auc.mean) and one.embedding_bytes.mean > 0]
    if not summaries:
        return None
    figure = new_figure(7.5, 5.0 if len(summaries) <= 8 else 6.2)
    axes = figure.add_subplot()
    axes.grid(True, axis="y")
    for row in results:
        style = styles[str(row["method"])]
        if row["auc"] is not None and math.isfinite(row["auc"]) and row["embedding_bytes"] > 0:
            axes.plot([row["embedding_bytes"]], [row["auc"]], style.marker, color=style.colour, ms=4, alpha=0.35, mew=0)
    for one in summaries:
        style = styles[one.method]
        error = one.auc.error if one.auc.error is not None and math.isfinite(one.auc.error) else 0.0
        axes.errorbar(
            one.embedding_bytes.mean, one.auc.mean, yerr=error, fmt=style.marker, color=style.colour, ms=7.5, capsize=3,
            elinewidth=1.2, mec="white", mew=0.4, zorder=5,
        )  # fmt: skip
    _size_axis(axes, results)
    _auc_axis(axes, results)
    reference = next((one for one in summaries if one.method == baseline_method(results)), None)
    if reference is not None:
        axes.axhline(reference.auc.mean, color=FAINT, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.set_xlabel("embedding tables as stored")
    axes.set_ylabel("test AUC")
    # Labels are placed in pixels, so the layout must stand still from here on.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    marks = [
        DirectLabel(s.embedding_bytes.mean, s.auc.mean, label(s.method, 34), darker(styles[s.method].colour))
        for s in summaries
    ]
    place_labels(axes, marks, _mark_boxes(axes, results, summaries), _line_box(axes, reference))
    return figure


def _size_axis(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    """Logarithmic, ticks at powers of two so that they read as whole KiB and MiB; room for labels at both ends."""
    sizes = [float(row["embedding_bytes"]) for row in results if row["embedding_bytes"] > 0]
    low, high = math.log2(min(sizes)), math.log2(max(sizes))
    margin = max(1.0, 0.12 * (high - low))
    low, high = low - margin, high + margin
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.0**low, 2.0**high)
    step = max(1, round((high - low) / 7))
    powers = [power for power in range(math.ceil(low), math.floor(high) + 1) if power % step == 0]
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_bytes(value, 0)))


def _auc_axis(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    """Limits with room for labels, at least 0.002 apart."""
    values = [float(row["auc"]) for row in results if row["auc"] is not None and math.isfinite(row["auc"])]
    low, high = min(values), max(values)
    margin = max(0.15 * (high - low), 0.001)
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4f}"))


def _mark_boxes(
    axes: Axes, results: Sequence[Mapping[str, Any]], summaries: Sequence[MethodSummary]
) -> NDArray[np.float64]:
    """Boxes in pixels around every point and error bar, [n, 4]."""
    pixels = axes.figure.dpi / 72.0
    boxes = []
    for row in results:
        if row["auc"] is not None and math.isfinite(row["auc"]) and row["embedding_bytes"] > 0:
            x, y = axes.transData.transform((row["embedding_bytes"], row["auc"]))
            boxes.append([x - 3 * pixels, y - 3 * pixels, x + 3 * pixels, y + 3 * pixels])
    for one in summaries:
        error = one.auc.error if one.auc.error is not None and math.isfinite(one.auc.error) else 0.0
        x, low = axes.transData.transform((one.embedding_bytes.mean, one.auc.mean - error))
        _, high = axes.transData.transform((one.embedding_bytes.mean, one.auc.mean + error))
        boxes.append([x - 5 * pixels, low - 4 * pixels, x + 5 * pixels, high + 4 * pixels])
    return np.array(boxes)


def _line_box(axes: Axes, reference: MethodSummary | None) -> NDArray[np.float64]:
    """The box in pixels of the line at fp32's AUC, [1, 4], or none, [0, 4]."""
    if reference is None:
        return np.empty((0, 4))
    frame = axes.get_window_extent()
    _, y = axes.transData.transform((reference.embedding_bytes.mean, reference.auc.mean))
    return np.array([[frame.x0, y - 2, frame.x1, y + 2]])
