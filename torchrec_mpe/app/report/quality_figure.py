"""AUC against real bytes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from torchrec_mpe.app.report.estimates import baseline_method, summarize
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
    for row in _shown(results):
        style = styles[str(row["method"])]
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
    texts = [
        axes.text(
            s.embedding_bytes.mean, s.auc.mean, label(s.method, 34), color=darker(styles[s.method].colour), fontsize=9
        )
        for s in summaries
    ]
    for text in texts:
        text.set_zorder(6)
    marks = axes.transData.transform([text.get_position() for text in texts])
    around = 6 * figure.dpi / 72
    adjust_text(
        texts,
        [row["embedding_bytes"] for row in _shown(results)],
        [row["auc"] for row in _shown(results)],
        [Bbox([mark - around, mark + around]) for mark in marks],
        ax=axes,
        iter_lim=300,  # not by time: a busy machine draws the same picture
        force_static=(0.4, 0.4),
        arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.7},
    )
    return figure


def _shown(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that can be drawn."""
    return [r for r in results if r["auc"] is not None and math.isfinite(r["auc"]) and r["embedding_bytes"] > 0]


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
