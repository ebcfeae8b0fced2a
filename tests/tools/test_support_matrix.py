"""The support matrix: of this repository's tests, and of tests that pass, fail and are skipped."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

_ROOT = Path(__file__).parents[2]
_TOOL = _ROOT / "tools" / "support_matrix.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_matrix", _TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["support_matrix"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_recorded_outcomes_of_the_marks_that_there_are(tool: ModuleType) -> None:
    again = "run python tools/support_matrix.py"
    record = json.loads((_ROOT / "docs" / "support_matrix.json").read_text())
    recorded = {tool.Mark(r["feature"], r["where"], r["test"]) for r in record["results"]}
    assert recorded == tool.declared_marks(_ROOT / "tests"), again
    page = _ROOT / "docs" / "serving.md"
    assert page.read_text() == tool.write_table(page, record), again


_TESTS = """
import pytest

@pytest.mark.supports("first", "CPU")
@pytest.mark.parametrize("x", [1, 2])
def test_good(x):
    assert x

class TestOfClass:
    @pytest.mark.supports("first", "CUDA")
    @pytest.mark.supports("second", "CPU")
    def test_skipped(self):
        pytest.skip("no GPU")

@pytest.mark.supports("second", "CUDA")
@pytest.mark.parametrize("x", [1, 0])
def test_bad(x):
    assert x

@pytest.fixture
def broken():
    raise OSError

@pytest.mark.supports("third", "CPU")
def test_error(broken):
    pass

@pytest.mark.supports("first", "CPU")
def test_also_good():
    pass

def test_unmarked():
    assert False
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers = supports(feature, where): x\naddopts = --strict-markers\n"
    )
    (tmp_path / "page.md").write_text(
        "before\n<!-- support matrix: begin -->\nold\n<!-- support matrix: end -->\nafter\n"
    )
    return tmp_path


def _run(project: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    paths = ["--tests", "tests", "--page", "page.md", "--record", "record.json"]
    command = [sys.executable, str(_TOOL), *(str(project / p) if "-" not in p else p for p in paths), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=project)


def test_outcomes_become_a_table(project: Path, tool: ModuleType) -> None:
    (project / "tests" / "test_some.py").write_text(_TESTS)
    ended = _run(project)
    assert ended.returncode == 0, ended.stderr
    record = json.loads((project / "record.json").read_text())
    counts = {
        (r["feature"], r["where"], r["test"]): (r["passed"], r["failed"], r["skipped"]) for r in record["results"]
    }
    file = "tests/test_some.py::"
    assert counts == {
        ("first", "CPU", f"{file}test_good"): (2, 0, 0),
        ("first", "CPU", f"{file}test_also_good"): (1, 0, 0),
        ("first", "CUDA", f"{file}TestOfClass::test_skipped"): (0, 0, 1),
        ("second", "CPU", f"{file}TestOfClass::test_skipped"): (0, 0, 1),
        ("second", "CUDA", f"{file}test_bad"): (1, 1, 0),
        ("third", "CPU", f"{file}test_error"): (0, 1, 0),
    }
    lines = (project / "page.md").read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert [line.split("|")[1:-1] for line in lines if line.startswith("| ")] == [
        [" ", *(f" {where} " for where in tool.WHERE)],
        [" first ", " works ", "  ", "  ", "  ", " not run "],
        [" second ", " not run ", "  ", "  ", "  ", " fails "],
        [" third ", " fails ", "  ", "  ", "  ", "  "],
    ]
    page = (project / "page.md").read_text()
    assert _run(project, "--render").returncode == 0
    assert (project / "page.md").read_text() == page

    # Another file is run alone: the others' outcomes stay, but not those of tests that are gone.
    (project / "tests" / "test_some.py").write_text(_TESTS.replace("def test_error", "def test_gone"))
    (project / "tests" / "test_other.py").write_text(
        'import pytest\n\n@pytest.mark.supports("other", "CPU")\ndef test_other():\n    pass\n'
    )
    assert _run(project, str(project / "tests" / "test_other.py")).returncode == 0
    results = {r["test"]: r for r in json.loads((project / "record.json").read_text())["results"]}
    assert results["tests/test_other.py::test_other"]["passed"] == 1
    assert results[f"{file}test_good"] == next(r for r in record["results"] if r["test"] == f"{file}test_good")
    assert f"{file}test_error" not in results and results[f"{file}test_gone"]["date"] is None
    assert "| third | not run |" in (project / "page.md").read_text()

    # Outcomes of other versions are not kept.
    record["versions"]["torch"] = "0.1"
    (project / "record.json").write_text(json.dumps(record))
    assert _run(project, str(project / "tests" / "test_other.py")).returncode == 0
    assert "| first | not run |" in (project / "page.md").read_text()


@pytest.mark.parametrize(
    "mark",
    ['"feature", "cpu"', '"feature"', '"feature", where="CPU"', '"feat" + "ure", "CPU"', '"feature", "CPU", "x"'],
)
def test_marks_that_say_nothing_are_refused(tool: ModuleType, tmp_path: Path, mark: str) -> None:
    file = tmp_path / "tests" / "test_some.py"
    file.parent.mkdir()
    file.write_text(f"import pytest\n\n@pytest.mark.supports({mark})\ndef test_it():\n    pass\n")
    with pytest.raises(ValueError, match=r"^tests/test_some.py::test_it: supports takes a feature and one of CPU"):
        tool.declared_marks(file.parent)


def test_tests_that_cannot_be_collected_leave_the_page(project: Path) -> None:
    page = (project / "page.md").read_text()
    source = (
        'import pytest\nimport no_such_module\n\n@pytest.mark.supports("feature", "CPU")\ndef test_it():\n    pass\n'
    )
    (project / "tests" / "test_some.py").write_text(source)
    ended = _run(project)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].startswith("support_matrix.py: pytest ended with ")
    assert (project / "page.md").read_text() == page and not (project / "record.json").exists()
