"""The HTML page: one file, no scripts, nothing loaded from elsewhere."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from torchrec_mpe.app.report.cache_tables import cache_tables
from torchrec_mpe.app.report.coded_tables import coded_tables
from torchrec_mpe.app.report.data import ReportData
from torchrec_mpe.app.report.estimates import MethodSummary, baseline_method, summarize
from torchrec_mpe.app.report.html_table import html_table
from torchrec_mpe.app.report.numerals import MISSING, bytes_with_error, decimal, in_bytes, with_error

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #5c5c63; --line: #d9d9de; --page: #ffffff; --band: #f4f4f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --soft: #a9a9b2; --line: #3c3c43; --page: #17171a; --band: #212126; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 70rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p, figcaption, dl { color: var(--soft); max-width: 46rem; }
p { margin: .25rem 0 .75rem; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .82rem; width: 100%; }
th, td { padding: .35rem .45rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; font-weight: 600; }
tbody tr:nth-child(even) { background: var(--band); }
th:first-child { text-align: left; font-weight: 600; white-space: normal; min-width: 7.5rem; max-width: 16rem;
  overflow-wrap: anywhere; }
small { font-weight: 400; color: var(--soft); display: block; }
figure { margin: 0 0 1.5rem; max-width: 58rem; }
@media (min-width: 60rem) { th:first-child { min-width: 12rem; } }
figure img { display: block; width: 100%; height: auto; min-width: 34rem; background: #ffffff; border-radius: 4px; }
figcaption { font-size: .9rem; margin-top: .5rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; font-size: .9rem;
  margin: 0; }
dt { font-weight: 600; color: var(--ink); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; margin-bottom: .5rem; }
@media print {
  :root { --ink: #000; --soft: #333; --line: #bbb; --page: #fff; --band: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .2rem .35rem; }
  figure img { min-width: 0; width: 80%; max-height: 22cm; object-fit: contain; object-position: left top; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


@dataclass(frozen=True)
class Picture:
    """A rendered figure: ``heading`` groups pictures (empty: under the one before), ``alt`` says what it shows."""

    file: str
    png: bytes
    heading: str
    caption: str
    alt: str


def html_page(report: ReportData, pictures: Sequence[Picture]) -> str:
    """The whole page, with the pictures inside it."""
    parts = [f"<h1>{escape(report.title)}</h1>"]
    if report.results:
        parts += [
            "<h2>Results</h2>",
            _results_table(report),
            _runs_table(report),
            coded_tables(report),
            cache_tables(report),
        ]
    for picture in pictures:
        heading = f"<h2>{escape(picture.heading)}</h2>\n" if picture.heading else ""
        source = base64.b64encode(picture.png).decode("ascii")
        parts.append(
            f'{heading}<figure><div class="wide"><img src="data:image/png;base64,{source}" alt="{escape(picture.alt)}">'
            f"</div><figcaption>{escape(picture.caption)}</figcaption></figure>"
        )
    parts += [_facts("Data", report.data), _facts("Environment", report.environment)]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing can be loaded or run, whatever a name in the data may hold.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _results_table(report: ReportData) -> str:
    """Mean and standard error per method."""
    baseline = baseline_method(report.results)
    header = [
        ("Method", ""),
        ("Seeds", ""),
        ("AUC", ""),
        ("AUC difference", f"to {baseline}, in 0.0001" if baseline is not None else "no fp32 run"),
        ("Log loss", ""),
        ("Bits", "per element"),
        ("Size", "as stored"),
        ("Compression", "fp32 / stored"),
        ("Time", "seconds"),
    ]
    summaries = summarize(report.results)
    rows = [_results_row(one, one.method == baseline) for one in summaries]
    errors = any(one.seeds > 1 for one in summaries)
    sizes = sorted({int(row["fp32_bytes"]) for row in report.results})
    full = f" The same tables in fp32 take {' or '.join(in_bytes(size) for size in sizes)}." if len(sizes) <= 2 else ""
    note = (
        "Mean ± standard error over seeds; an error that rounds to zero is left out."
        if errors
        else "One seed each, so no standard errors."
    )
    if any(one.hit_rate is not None for one in summaries):
        full += " Of a method with a cache it is the store, flushed and without optimizer state."
    return f"<p>{note} Size counts packed rows, directories and scales: real bytes.{escape(full)}</p>\n" + html_table(
        header, rows
    )


def _results_row(one: MethodSummary, is_baseline: bool) -> list[str]:
    difference = "0" if is_baseline else MISSING if one.delta is None else with_error(one.delta, 1, 1e4, sign=True)
    return [
        one.method,
        str(one.seeds),
        with_error(one.auc, 4),
        difference,
        with_error(one.logloss, 4),
        with_error(one.average_bits, 3),
        bytes_with_error(one.embedding_bytes),
        f"{decimal(one.compression_ratio.mean, 1)}\N{MULTIPLICATION SIGN}",
        with_error(one.seconds, 1 if one.seconds.mean < 100 else 0),
    ]


def _runs_table(report: ReportData) -> str:
    """Every run's own numbers, folded away."""

    def number(value: float | None, digits: int) -> str:
        return MISSING if value is None else decimal(float(value), digits)

    header = [("Method", ""), ("Seed", ""), ("AUC", ""), ("Log loss", ""), ("Bits", "per element"), ("Size", "bytes")]
    header += [("Compression", "fp32 / stored"), ("Time", "seconds")]
    rows = [
        [
            str(row["method"]),
            str(row["seed"]),
            number(row["auc"], 5),
            number(row["logloss"], 5),
            number(row["average_bits"], 4),
            number(row["embedding_bytes"], 0),
            number(row["compression_ratio"], 2),
            number(row["seconds"], 1),
        ]
        for row in report.results
    ]
    return f"<details><summary>Every run</summary>\n{html_table(header, rows)}\n</details>"


def _facts(heading: str, facts: Mapping[str, str | int | float]) -> str:
    """Names and values in two columns."""
    if not facts:
        return ""
    lines = "\n".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(f'{value:,}' if isinstance(value, int) else str(value))}</dd>"
        for name, value in facts.items()
    )
    return f"<h2>{escape(heading)}</h2>\n<dl>\n{lines}\n</dl>"
