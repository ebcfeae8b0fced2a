"""The report: its numbers, its safety and its files."""

import dataclasses
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

from torchrec_mpe.app.report.coded_tables import coded_tables
from torchrec_mpe.app.report.data import CodedTable, ReportData
from torchrec_mpe.app.report.estimates import baseline_method, difference, estimate
from torchrec_mpe.app.report.hit_rate_figure import _joined, _missing_most
from torchrec_mpe.app.report.numerals import decimal, in_bytes, short_count
from torchrec_mpe.app.report.quality_figure import quality_figure
from torchrec_mpe.app.report.style import house_style, label, method_styles
from torchrec_mpe.app.report.widths_figures import frequency_decades, width_shares
from torchrec_mpe.app.report.write import write_report
from torchrec_mpe.cache.statistics import CacheStatistics
from torchrec_mpe.coding.code_tables import TableSummary
from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.layout import TableLayout

PNG = b"\x89PNG\r\n\x1a\n"


def result(method: str, seed: int, auc: float, size: int = 1000, **others: Any) -> dict[str, Any]:
    row = {"method": method, "seed": seed, "auc": auc, "logloss": 0.45, "average_bits": 32.0, "embedding_bytes": size}
    return {**row, "fp32_bytes": 4 << 20, "compression_ratio": (4 << 20) / max(size, 1), "seconds": 10.0, **others}


# By hand. fp32's AUC: mean 0.7810, deviations -10, 0, +10 (in 0.0001), variance (100 + 0 + 100) / 2 = 100, so the error
# is 10 / sqrt(3) = 5.7735. mpe's: mean 0.7800, deviations -20, -10, +30, variance 1400 / 2 = 700, error
# sqrt(700 / 3) = 15.2753. Seed by seed mpe - fp32 = -20, -20, +10: mean -10, deviations -10, -10, +20, variance
# 600 / 2 = 300, error sqrt(300 / 3) = 10.
RESULTS = [
    result("fp32", 0, 0.7800, 4 << 20, logloss=0.44, seconds=100.0),
    result("fp32", 1, 0.7810, 4 << 20, logloss=0.45, seconds=200.0),
    result("fp32", 2, 0.7820, 4 << 20, logloss=0.46, seconds=300.0),
    # Bits: mean 0.25, deviations -0.01, 0, +0.01, error 0.01 / sqrt(3) = 0.0058. Bytes: 40, 42, 44 KiB: mean 42, error
    # 2 / sqrt(3) = 1.1547. Ratio: (100 + 101 + 105) / 3 = 102.
    result("mpe", 0, 0.7780, 40 << 10, average_bits=0.24, compression_ratio=100.0, logloss=0.45, seconds=10.0),
    result("mpe", 1, 0.7790, 42 << 10, average_bits=0.25, compression_ratio=101.0, logloss=0.45, seconds=10.0),
    result("mpe", 2, 0.7830, 44 << 10, average_bits=0.26, compression_ratio=105.0, logloss=0.45, seconds=16.0),
    result("rule", 0, 0.7700, 512, average_bits=0.3),
]
TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
EXPECTED = {
    "fp32": "3|0.7810 ± 0.0006|0|0.4500 ± 0.0058|32.000|4.0 MiB|1.0x|200 ± 58",
    "mpe": "3|0.7800 ± 0.0015|-10.0 ± 10.0|0.4500|0.250 ± 0.006|42.0 ± 1.2 KiB|102.0x|12.0 ± 2.0",
    "rule": "1|0.7700|-110.0|0.4500|0.300|512 B|8,192.0x|10.0",
}


def full_report(methods: tuple[str, ...] = ("mpe", "rule"), title: str = "A log") -> ReportData:
    """Two tables and every part."""
    ranks = torch.tensor([2, 0, 1, 3], dtype=torch.int32)
    plan = {"user": TableBitWidths(4, 8, (0, 1, 4), (6, 2), ranks), "shop": TableBitWidths(1, 8, (0, 1), (0,))}
    validation = [{"step": 10, "auc": 0.7}, {"step": 20, "auc": 0.75}]
    return ReportData(
        title=title,
        results=RESULTS,
        curves=[
            {
                "method": m,
                "seed": s,
                "phase": p,
                "steps": [5, 10, 20],
                "loss": [0.7, 0.5, 0.4],
                "validation": validation,
            }
            for m in methods
            for s in (0, 1)
            for p in ("search", "retrain 1", "retrain 2", "retrain 3")
        ],
        plans=dict.fromkeys(methods, plan),
        counts={"user": torch.tensor([5, 100, 12, 0]), "shop": torch.tensor([117])},
        probabilities={methods[0]: {"user": ((0, 1, 4), torch.tensor([[0.1, 0.9], [0.6, 0.4]]))}},
        candidate_bits=(2, 6),
        environment={"torch": "2.13.0", "command line": "torchrec-mpe run --methods 'a & b'"},
        data={"rows": 1234567, "split": "8:1:1"},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report") / "new" / "folder", full_report())


class Cells(HTMLParser):
    """The rows of the page's tables, and every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_every_number_of_the_table(written: Path) -> None:
    rows = Cells(written.read_text()).rows
    plain = {row[0]: "|".join(row[1:]).replace(TIMES, "x").replace(MINUS, "-") for row in rows[1:4]}
    assert plain == EXPECTED
    assert len(rows) == 1 + 3 + 1 + len(RESULTS)
    assert "4.0 MiB" in written.read_text().split("<table>")[0]
    assert rows[-1] == ["rule", "0", "0.77000", "0.45000", "0.3000", "512", "8,192.00", "10.0"]


def test_pictures_are_beside_the_page_and_inside_it(written: Path) -> None:
    names = {file.name for file in written.parent.iterdir()}
    assert names == {
        "report.html",
        "auc-by-size.png",
        "widths-by-order-1.png",
        "width-shares.png",
        "probabilities-1.png",
        "training.png",
    }
    for file in written.parent.glob("*.png"):
        assert file.read_bytes().startswith(PNG)
        assert file.stat().st_size > 5000, file
    images = [attributes for tag, attributes in Cells(written.read_text()).tags if tag == "img"]
    assert len(images) == 5
    for image in images:
        assert (image["src"] or "").startswith("data:image/png;base64,")
        assert len(image["alt"] or "") > 30


def test_nothing_is_loaded_or_linked(written: Path) -> None:
    page = written.read_text()
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<iframe", re.sub(r"base64,[\w+/=]+", "", page))
    sources = [value for _, attrs in Cells(page).tags for name, value in attrs.items() if name in ("src", "href")]
    assert sources and all((value or "").startswith("data:") for value in sources)
    assert "default-src 'none'" in page


def test_facts_are_shown(written: Path) -> None:
    page = written.read_text()
    assert "<dd>1,234,567</dd>" in page
    assert "&#x27;a &amp; b&#x27;" in page


def test_hostile_names(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'>&$x_$ \n\\frac"
    report = dataclasses.replace(
        full_report((hostile,), title=hostile),
        results=[*RESULTS, result(hostile, 0, 0.77)],
        environment={hostile: hostile},
        data={hostile: hostile},
    )
    tables = {"_$\\bad{$ <b>": TableBitWidths(4, 8, (0, 4), (8,))}
    report = dataclasses.replace(report, plans={hostile: tables, "_x": tables})
    page = write_report(tmp_path, report).read_text()
    assert "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&gt;&amp;$x_$" in page
    assert any(row[0] == hostile for row in Cells(page).rows)


@pytest.mark.parametrize("row", [result("fp32", 0, 0.78), result("mpe", 0, math.nan), result("mpe", 0, 0.7, 0)])
def test_one_run_alone(tmp_path: Path, row: dict[str, Any]) -> None:
    page = write_report(tmp_path, ReportData("One", [row])).read_text()
    assert "no standard errors" in page
    drawn = math.isfinite(row["auc"]) and row["embedding_bytes"] > 0
    assert [file.name for file in tmp_path.glob("*.png")] == (["auc-by-size.png"] if drawn else [])
    assert "<h2>Training</h2>" not in page and "±" not in page


def test_no_results_at_all(tmp_path: Path) -> None:
    assert "<h1>Empty</h1>" in write_report(tmp_path, ReportData("Empty", [])).read_text()


def test_parts_may_be_missing(tmp_path: Path) -> None:
    report = dataclasses.replace(full_report(), counts={}, probabilities={}, candidate_bits=())
    short = [{**curve, "validation": [], "steps": [1], "loss": [0.5]} for curve in report.curves]
    write_report(tmp_path, dataclasses.replace(report, curves=short))
    assert {file.name for file in tmp_path.glob("*.png")} == {
        "auc-by-size.png",
        "widths-by-order-1.png",
        "training.png",
    }


def test_many_methods_and_fields(tmp_path: Path) -> None:
    methods = [f"method {i}" for i in range(15)]
    plan = {f"field {i}": TableBitWidths(3, 8, (0, 1, 3), (i % 9, 0)) for i in range(40)}
    results = [result(method, 0, 0.78 + i % 4 * 1e-4, 1000 + i) for i, method in enumerate(methods)]
    page = write_report(tmp_path, ReportData("Many", results, plans={"a": plan, "b": plan})).read_text()
    assert all(f">{method}<" in page for method in methods)


def test_direct_labels_do_not_overlap() -> None:
    # Five methods at nearly the same place, and two far off.
    spots = [
        (1000, 0.7800),
        (1010, 0.7801),
        (1020, 0.7800),
        (1005, 0.7799),
        (990, 0.7801),
        (64000, 0.7850),
        (900, 0.77),
    ]
    results = [result(f"a method of size {size}", 0, auc, size) for size, auc in spots]
    with house_style():
        figure = quality_figure(results, method_styles([row["method"] for row in results]))
        assert figure is not None
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
        frame = figure.axes[0].get_window_extent()
    assert len(boxes) == len(spots)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


def test_no_fp32_run(tmp_path: Path) -> None:
    rows = [result("mpe", seed, 0.78 + seed * 1e-3, average_bits=1.0) for seed in (0, 1)]
    table = Cells(write_report(tmp_path, ReportData("None", rows)).read_text()).rows
    assert table[1][3] == "n/a" and "no fp32 run" in table[0][3]


def test_nothing_is_left_of_a_failed_rendering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr("torchrec_mpe.app.report.page.html_page", fail)
    with pytest.raises(RuntimeError, match="no page"):
        write_report(tmp_path / "new", full_report())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("earlier", [False, True])
def test_nothing_is_left_of_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool) -> None:
    folder = tmp_path / "new"
    if earlier:
        folder.mkdir()
        (folder / "report.html").write_text("an earlier page")
    real = atomic_file

    @contextmanager
    def full_disk(path: Path) -> Iterator[Path]:
        with real(path) as temporary:
            yield temporary
            if path.name == "report.html":
                raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchrec_mpe.app.report.write.atomic_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(folder, ReportData("One", [result("fp32", 0, 0.78)]))
    if earlier:
        assert [file.name for file in folder.iterdir()] == ["report.html"]
        assert (folder / "report.html").read_text() == "an earlier page"
    else:
        assert not folder.exists()


def test_again_over_itself_and_the_same_bytes(tmp_path: Path) -> None:
    report = ReportData("One", RESULTS)
    first = write_report(tmp_path, report).read_bytes()
    assert write_report(tmp_path, report).read_bytes() == first


def test_the_users_matplotlib_settings_are_kept(tmp_path: Path) -> None:
    with matplotlib.rc_context({"text.usetex": True, "font.size": 31.0}):
        write_report(tmp_path, ReportData("One", [result("fp32", 0, 0.78)]))
        assert matplotlib.rcParams["text.usetex"] and matplotlib.rcParams["font.size"] == 31.0


def cached_result(method: str, seed: int, training_bytes: int) -> dict[str, Any]:
    counters = {
        "user": vars(CacheStatistics(10, 4000, 2000, 500, 30, 400)),
        "shop": vars(CacheStatistics(10, 4000, 1000, 100, 0, 0)),
    }
    return {
        **result(method, seed, 0.78),
        "training_bytes": training_bytes,
        "fp32_training_bytes": 6 << 20,
        "training_bytes_by_kind": {"store": 1 << 20, "spill": training_bytes - (1 << 20)},
        "hit_rate": 0.8,
        "cache_statistics": counters,
    }


def test_caches(tmp_path: Path) -> None:
    windows = [
        {"user": CacheStatistics(5, 2000, 1000, 400), "shop": CacheStatistics(5, 2000, 500, 100)},
        {"user": CacheStatistics(5, 2000, 1000, 100), "shop": CacheStatistics(5, 2000, 500, 0)},
    ]
    curve = {"steps": [5, 10], "loss": [0.7, 0.5], "validation": [], "seed": 0}
    method = "cache:int8:0.05"
    fp32 = {**result("fp32", 0, 0.781), "training_bytes": 6 << 20, "fp32_training_bytes": 6 << 20}
    results = [fp32, cached_result(method, 0, 2 << 20), cached_result(method, 1, 3 << 20)]
    curves = [{**curve, "method": method, "phase": f"train {k}", "caches": windows} for k in (1, 2)]
    report = ReportData("Caches", results, [*curves, {**curve, "method": "fp32", "phase": "train 1", "caches": []}])
    page = write_report(tmp_path, report).read_text()
    rows = {row[0]: row[1:] for row in Cells(page.split("<h2>Caches</h2>")[1].split("<h2>")[0]).rows}
    # Mean of 2 and 3 MiB and of their ratios 3 and 2 to 6 MiB; the kinds are those of the first seed.
    assert rows[method][:2] == ["10", "8,000"], "the second table is the counters'"
    assert [row[1:5] for row in Cells(page).rows if row[0] == method and TIMES in row[2]] == [
        ["2.5 ± 0.5 MiB", f"2.50{TIMES}", "80.00%", "1.0 MiB"]
    ]
    assert [row[1:4] for row in Cells(page).rows if row[0] == "fp32" and TIMES in row[2]] == [
        ["6.0 MiB", f"1.00{TIMES}", "n/a"]
    ]
    assert rows[f"{method}, user"] == ["10", "4,000", "2,000", "500", "30", "400", "75.00%"]
    assert (tmp_path / "hit-rates.png").read_bytes().startswith(PNG)
    assert "without optimizer state" in page
    steps, joined, starts = _joined(curves)
    assert (steps, starts) == ([5, 10, 15, 20], [0, 10]) and joined == [*windows, *windows]


def test_no_caches(written: Path) -> None:
    assert "<h2>Caches</h2>" not in written.read_text() and "without optimizer state" not in written.read_text()


def test_hit_rates_of_one_window_and_many_tables(tmp_path: Path) -> None:
    window = {f"_$ {k}": CacheStatistics(1, 9, 9, k) for k in range(9)}
    assert _missing_most([window]) == [f"_$ {k}" for k in range(3, 9)]
    curve = {"method": "c", "seed": 0, "phase": "train", "steps": [1], "loss": [0.5], "validation": []}
    write_report(tmp_path, ReportData("x", [], [{**curve, "caches": [window]}]))
    assert (tmp_path / "hit-rates.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="a curve of c has 1 steps, 2 caches"):
        ReportData("x", [], [{**curve, "caches": [window, window]}])


def test_data_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"results\[0\] lacks seed, auc"):
        ReportData("x", [{"method": "a"}])
    with pytest.raises(ValueError, match="1 steps, 2 losses"):
        curve = {"method": "a", "seed": 0, "phase": "train", "steps": [1], "loss": [1.0, 2.0], "validation": []}
        ReportData("x", [], [curve])
    with pytest.raises(ValueError, match="a has 4 rows in t, counts have 3"):
        ReportData("x", [], plans={"a": {"t": TableBitWidths(4, 8, (0, 4), (1,))}}, counts={"t": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"must be \[1, 2\], got \[2, 2\]"):
        ReportData("x", [], probabilities={"a": {"t": ((0, 4), torch.ones(2, 2))}}, candidate_bits=(0, 1))


def test_estimates() -> None:
    assert estimate([3.0]).error is None
    assert estimate([1.0, 3.0]).mean == 2.0 and estimate([1.0, 3.0]).error == pytest.approx(1.0)
    assert math.isnan(estimate([1.0, None]).mean)
    paired = difference({0: 1.0, 1: 2.0}, {1: 1.5, 0: 0.5})
    assert (paired.mean, paired.error) == (0.5, 0.0)
    apart = difference({0: 1.0, 1: 3.0}, {5: 1.0, 6: 1.0})
    assert apart.mean == 1.0 and apart.error == pytest.approx(1.0)
    assert difference({0: 1.0}, {5: 1.0, 6: 3.0}).error is None
    assert baseline_method([result("full", 0, 0.5)]) == "full"


def test_widths_by_decade() -> None:
    assert frequency_decades(torch.tensor([0, 1, 9, 10, 99, 100, 10**15])).tolist() == [0, 1, 1, 2, 2, 3, 16]
    plan = full_report().plans["mpe"]
    decades = {name: frequency_decades(counts) for name, counts in full_report().counts.items()}
    shares = width_shares(plan, decades)
    assert shares is not None
    starts, rows = shares
    # user's rows by id: 5 (rank 2, 2 bits), 100 (rank 0, 6 bits), 12 (2 bits), 0 (2 bits); shop's: 117 (0 bits).
    assert starts == [0, 1, 10, 100]
    assert [{bits: n for bits, n in enumerate(row) if n} for row in rows] == [{2: 1}, {2: 1}, {2: 1}, {0: 1, 6: 1}]
    assert width_shares(plan, {}) is None


def test_numerals() -> None:
    assert [short_count(n) for n in (0, 7, 999, 999.6, 1000, 1234, 9960, 38123, 999_600, 4.1e6)] == [
        "0", "7", "999", "1k", "1k", "1.2k", "10k", "38k", "1M", "4.1M",
    ]  # fmt: skip
    assert decimal(-0.5, 1) == f"{MINUS}0.5" and decimal(math.nan, 1) == "n/a" and decimal(math.inf, 1) == "∞"
    assert in_bytes(1023) == "1,023 B" and in_bytes(1536) == "1.5 KiB" and in_bytes(3 << 30) == "3.0 GiB"
    assert label("a" * 50, 20) == "a" * 13 + "…" + "a" * 6
    assert label("_x", 9) == " _x" and label("", 9) == "(no name)"


def test_coded_tables_by_hand() -> None:
    """Of 4096 bytes and a deviation of 10: table a has 3/4 and 8, of which 2 are lost, b the rest, of which .5 are."""
    layouts = [TableLayout(name, rows, 8, Directory.RANKED, (0,) * 9, ()) for name, rows in (("a", 1500), ("b", 500))]
    summaries = [
        TableSummary(2, (0.6, 0.25, 0.15), 10, 1400, 90, 0, error=2.0, deviation=8.0),
        TableSummary(0, (1.0,), 400, 0, 60, 40, error=0.5, deviation=2.0),
    ]
    codings = {
        "coded:9": {
            layout.name: CodedTable(layout, summary, size)
            for layout, summary, size in zip(layouts, summaries, (3072, 1024), strict=True)
        }
    }
    page = coded_tables(dataclasses.replace(full_report(), codings=codings))
    rows = [
        re.findall(r">([^<]*)</t[hd]>", line) for line in page.splitlines() if line.startswith('<tr><th scope="row">')
    ]
    assert rows == [
        ["coded:9", "2,000", "", "", "", "", "", "4.0 KiB", "", "", "25.0%"],
        ["coded:9, a", "1,500", "2 of 8", "85.0%", "10", "1,400", "90", "3.0 KiB", "75.0%", "80.0%", "25.0%"],
        ["coded:9, b", "500", "0 of 8", "n/a", "400", "0", "100", "1.0 KiB", "25.0%", "20.0%", "25.0%"],
    ]
    assert coded_tables(full_report()) == ""
