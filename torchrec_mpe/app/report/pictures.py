"""Which figures a report has, with their captions."""

import math

from torchrec_mpe.app.report.components_figure import components_figure
from torchrec_mpe.app.report.data import ReportData
from torchrec_mpe.app.report.estimates import summarize
from torchrec_mpe.app.report.hit_rate_figure import hit_rate_figure
from torchrec_mpe.app.report.numerals import bytes_with_error, with_error
from torchrec_mpe.app.report.page import Picture
from torchrec_mpe.app.report.probabilities_figure import probabilities_figure
from torchrec_mpe.app.report.quality_figure import quality_figure
from torchrec_mpe.app.report.style import house_style, method_styles, to_png
from torchrec_mpe.app.report.training_figure import training_figure
from torchrec_mpe.app.report.widths_figures import METHODS_A_FIGURE, width_by_order_figure, width_shares_figure


def report_pictures(report: ReportData) -> list[Picture]:
    """Every figure that the data allows, rendered."""
    with house_style():
        return [
            *_quality(report),
            *_widths(report),
            *_components(report),
            *_probabilities(report),
            *_hit_rates(report),
            *_training(report),
        ]


def _quality(report: ReportData) -> list[Picture]:
    figure = quality_figure(report.results, method_styles(report.methods))
    if figure is None:
        return []
    told = "; ".join(
        f"{one.method}: AUC {with_error(one.auc, 4)} at {bytes_with_error(one.embedding_bytes)}"
        for one in summarize(report.results)
        if math.isfinite(one.auc.mean)
    )
    caption = (
        "Higher is better, further left is smaller. A faint point is one seed, a full one the mean with its standard "
        "error. The dashed line is fp32."
    )
    return [Picture("auc-by-size.png", to_png(figure), "AUC against real bytes", caption, f"Scatter plot. {told}.")]


def _widths(report: ReportData) -> list[Picture]:
    styles = method_styles(report.methods)
    plans = {method: fields for method, fields in report.plans.items() if fields}
    pictures = []
    methods = list(plans)
    figures = -(-len(methods) // METHODS_A_FIGURE)
    each = -(-len(methods) // max(figures, 1))
    for number in range(figures):
        chosen = methods[number * each : (number + 1) * each]
        figure = width_by_order_figure({method: plans[method] for method in chosen}, styles)
        caption = f"One panel per field: the bits of a row by how frequent the row is, for {', '.join(chosen)}."
        if len(chosen) > 1:
            caption += " Widths are whole numbers; the lines are set a little apart so that none hides another."
        averages = "; ".join(
            f"{method} {sum(w.average_bits * w.num_embeddings for w in plans[method].values()) / rows:.3f}"
            for method in chosen
            if (rows := sum(w.num_embeddings for w in plans[method].values()))
        )
        alt = f"Step plots of bit-width against the order of frequency by field. Bits per row on average: {averages}."
        heading = "Bit-width by frequency" if number == 0 else ""
        pictures.append(Picture(f"widths-by-order-{number + 1}.png", to_png(figure), heading, caption, alt))
    shares = width_shares_figure(plans, report.counts)
    if shares is not None:
        caption = (
            "All fields together: of the rows seen about equally often, the share that gets each bit-width. The number "
            "above a bar is how many rows it stands for."
        )
        alt = "Stacked bars: share of rows of each bit-width by how often the row was seen in training, by method."
        pictures.append(Picture("width-shares.png", to_png(shares), "", caption, alt))
    return pictures


def _components(report: ReportData) -> list[Picture]:
    pictures: list[Picture] = []
    for method, tables in report.codings.items():
        if not tables:
            continue
        layouts = {name: table.layout for name, table in tables.items()}
        rows = sum(layout.num_embeddings for layout in layouts.values())
        average = 8 * sum(layout.payload_bytes for layout in layouts.values()) / rows
        caption = (
            f"{method}, one panel per field: the bit-width of each component, the first below, of rows by how frequent "
            "they are. Hatched rows are plain: all their elements have one width."
        )
        alt = (
            f"Bars of bit-widths by component in the order of frequency, by field. {average:.2f} bits a row on average."
        )
        heading = "" if pictures else "Components by frequency"
        figure = components_figure(layouts)
        pictures.append(Picture(f"components-{len(pictures) + 1}.png", to_png(figure), heading, caption, alt))
    return pictures


def _probabilities(report: ReportData) -> list[Picture]:
    pictures: list[Picture] = []
    for method, fields in report.probabilities.items():
        if not fields or not report.candidate_bits:
            continue
        figure = probabilities_figure(fields, report.candidate_bits)
        heading = "" if pictures else "What the search found"
        caption = (
            f"{method}: how likely each candidate bit-width is after the search, for each group of rows of similar "
            "frequency. One bright cell per column means that the search made up its mind."
        )
        alt = f"Heat maps by field for {method}: probability of each candidate bit-width in the order of frequency."
        pictures.append(Picture(f"probabilities-{len(pictures) + 1}.png", to_png(figure), heading, caption, alt))
    return pictures


def _hit_rates(report: ReportData) -> list[Picture]:
    curves = [curve for curve in report.curves if curve.get("caches")]
    if not curves:
        return []
    caption = (
        "The share of a batch's distinct rows that were in the cache, in windows of steps, of the first seed. A dashed "
        "line is a reset of the rows, which empties the cache."
    )
    alt = "Line plots of the cache's hit rate by step, a panel per method, a line per table and one for all tables."
    return [Picture("hit-rates.png", to_png(hit_rate_figure(curves)), "Hit rates", caption, alt)]


def _training(report: ReportData) -> list[Picture]:
    curves = [curve for curve in report.curves if curve["steps"] or curve["validation"]]
    if not curves:
        return []
    figure = training_figure(curves, method_styles(report.methods))
    caption = (
        "Top: log loss on training data, averaged over windows; the steep start of a phase may leave the panel at the "
        "top. Below: AUC on validation data. A line per seed, the same scale in every phase."
    )
    alt = "Line plots of training log loss and validation AUC by step, a panel per phase, a colour per method."
    return [Picture("training.png", to_png(figure), "Training", caption, alt)]
