"""The pages that state figures: what the committed records say, and what other records would."""

import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

_ROOT = Path(__file__).parents[2]
_TOOL = _ROOT / "tools" / "results.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("results_tool", _TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.fixture
def records(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the records, which the tool reads."""
    for file in (_ROOT / "benchmarks" / "results").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(tool, "RECORDS", tmp_path)
    return tmp_path


def test_the_pages_say_what_the_records_say(tool: ModuleType) -> None:
    for page in tool.PAGES:
        current = (_ROOT / page).read_text()
        assert current == tool.rendered(page, current), f"{page}: run python tools/results.py"


def test_every_record_is_shown(tool: ModuleType) -> None:
    recorded = {file.name.partition(".")[0] for file in tool.RECORDS.glob("*.json")}
    assert recorded == tool.FIGURES.keys()
    texts = "".join(file.read_text() for file in tool.TEXTS.glob("*.md"))
    for name in recorded:
        for figure, value in tool.figures(name)[0].items():
            if value.startswith("|"):
                assert f"{{{{ {name}: {figure} }}}}" in texts


def test_other_figures_make_other_pages(tool: ModuleType, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = records / "accuracy_ciao.json"
    runs = json.loads(file.read_text())
    for run in runs:
        if run["label"] == "rule:30":
            run["auc"], run["embedding_bytes"], run["compression_ratio"] = 0.5 + run["seed"] / 10, 1234, 45.6
    file.write_text(json.dumps(runs))
    base = statistics.fmean(run["auc"] for run in runs if run["label"] == "fp32, 3 resets")
    page = tool.rendered("docs/results.md", "")
    assert f"| rule:30 | 0.6000 ± 0.0577 | {0.6 - base:+.4f} | 1.06 | 1,234 | 45.6x |" in page
    assert f"the rule loses {base - 0.6:.4f} at 30x" in page
    readme = _ROOT / "README.md"
    assert f"{0.6 - base:+.4f} at 45.6 (`rule:30`)" in tool.rendered("README.md", readme.read_text())

    before = readme.read_text()
    with pytest.raises(SystemExit, match=r"^docs/results.md, README.md: not what the records say"):
        tool.main(["--check"])
    assert readme.read_text() == before


def test_the_table_of_a_further_machine_follows(tool: ModuleType, records: Path) -> None:
    runs = json.loads((records / "scaling.json").read_text())
    for run in runs:
        run.update(cpu="Another CPU", cores=96, ratio=7.0)
    (records / "scaling.another.json").write_text(json.dumps(runs))
    first, _, second = tool.fill("{{ scaling: table }}\n\n{{ scaling: search }}").partition(
        "\n\nOn Another CPU, 96 cores; "
    )
    assert "| table-wise | 2 | 1.02 | 1.20 | 1.10 |" in first
    assert "| table-wise | 2 | 7.00 | 7.00 | 7.00 |" in second
    assert second.endswith("\n\n1.11 to 1.25"), "text is of the first machine"


def test_lookups_with_avx2_stand_in_brackets(tool: ModuleType, records: Path) -> None:
    runs = json.loads((records / "lookup.json").read_text())
    for run in runs:
        if run["case"] == "mean of 8 cells" and (run["bits"], run["rival"], run["dim"]) == ("2", "INT2", 64):
            run["ratio"] = {"avx512": 3.0, "avx2": 0.25}[run["capability"]]
    (records / "lookup.json").write_text(json.dumps(runs))
    line, *_ = [x for x in tool.fill("{{ lookup: means }}").splitlines() if x.startswith("| 2 bits | INT2 |")]
    assert line.split(" | ")[3] == "3.00 (0.25)"
    assert tool.fill("{{ lookup: against INT, avx512 }}").endswith(" to 3.00")
    assert tool.fill("{{ lookup: against INT, avx2 }}").startswith("0.25 to ")


def test_counts_that_differ_from_the_formulas_are_no_result(tool: ModuleType, records: Path) -> None:
    runs = json.loads((records / "communication.json").read_text())
    next(run for run in runs if "counted" in run)["counted"] += 1
    (records / "communication.json").write_text(json.dumps(runs))
    with pytest.raises(ValueError, match="differs from the formulas"):
        tool.fill("{{ communication: terabyte }}")


def test_what_is_no_figure_is_refused(tool: ModuleType) -> None:
    with pytest.raises(KeyError):
        tool.fill("{{ lookup: no such figure }}")
    with pytest.raises(ValueError, match="has no line"):
        tool.rendered("README.md", "# a page without a block")


def test_code_is_not_broken_over_lines(tool: ModuleType) -> None:
    filled = tool.fill(f"{'word ' * 22}\n`python\nbenchmarks/x.py --quick` and {'more ' * 20}\n")
    assert "\n`python benchmarks/x.py --quick` and" in filled and filled.endswith("more\n")
    assert max(map(len, filled.splitlines())) <= 120


def test_items_of_a_list_are_wrapped_with_an_indent(tool: ModuleType) -> None:
    filled = tool.fill(f"- one\n  and\n- {'two ' * 40}\n")
    assert filled.splitlines() == ["- one and", "- " + " ".join(["two"] * 29), "  " + " ".join(["two"] * 11)]


def test_the_readme_is_short() -> None:
    assert len((_ROOT / "README.md").read_text().splitlines()) <= 150
