"""The table of docs/serving.md that says what works where, from the outcomes of tests.

    python tools/support_matrix.py                      # runs the marked tests, records outcomes, writes the table
    python tools/support_matrix.py tests/inference      # runs those there; the others' outcomes stay
    python tools/support_matrix.py --render             # only writes the table of the recorded outcomes again

A test says what it shows with ``@pytest.mark.supports("feature", "where")``, two literal strings, "where" one of WHERE.
A cell is "works" if all tests marked so passed, "fails" if one failed, "not run" if one was skipped, as CUDA's are
on a machine without a GPU, or not run with these versions. No cell is written by hand.
"""

import argparse
import ast
import datetime
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"
WHERE = ("CPU", "several ranks, gloo", "C++ process", "Triton's interpreter", "CUDA")


@dataclass(frozen=True, order=True)
class Mark:
    """A feature, where it is shown to work, and the test: ``tests/x/test_y.py::test_z``."""

    feature: str
    where: str
    test: str


def declared_marks(tests: Path) -> set[Mark]:
    """The marks in the sources of a folder of tests, which are not run.

    Raises:
        ValueError: naming the test, if a mark is not two literal strings, or says another "where" than WHERE.
    """
    found: set[Mark] = set()
    for file in sorted(tests.rglob("*.py")):
        name = file.relative_to(tests.parent).as_posix()
        for prefix, function in _functions(ast.parse(file.read_text()), ""):
            test = f"{name}::{prefix}{function.name}"
            for decorator in function.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.supports":
                    feature, where = _arguments(test, decorator)
                    found.add(Mark(feature, where, test))
    return found


def _functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield prefix, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}::")


def _arguments(test: str, mark: ast.Call) -> tuple[str, str]:
    values = [argument.value for argument in mark.args if isinstance(argument, ast.Constant)]
    match values:
        case [str(feature), str(where)] if where in WHERE and len(mark.args) == 2 and not mark.keywords:
            return feature, where
    raise ValueError(f"{test}: supports takes a feature and one of {', '.join(WHERE)}, as literal strings")


class Outcomes:
    """A pytest plugin that counts the outcomes of each mark's cases."""

    def __init__(self) -> None:
        self.counts: dict[Mark, dict[str, int]] = {}
        self._marks: dict[str, list[Mark]] = {}

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            test = item.nodeid.partition("[")[0]
            marks = [mark.args for mark in item.iter_markers("supports")]
            self._marks[item.nodeid] = [Mark(feature, where, test) for feature, where in marks]
            for mark in self._marks[item.nodeid]:
                self.counts.setdefault(mark, {"passed": 0, "failed": 0, "skipped": 0})

    def pytest_runtest_logreport(self, report: Any) -> None:
        # A case passes in its call alone; it can fail or be skipped in setup and teardown too.
        if report.when == "call" or report.outcome != "passed":
            for mark in self._marks[report.nodeid]:
                self.counts[mark][report.outcome] += 1


def run(tests: Path, chosen: Sequence[Path]) -> dict[Mark, dict[str, int]]:
    """Run the marked tests: for each mark how many cases passed, failed and were skipped.

    Args:
        tests (Path): the folder of all tests.
        chosen (Sequence[Path]): files and folders whose tests are run; none: all.

    Raises:
        RuntimeError: if pytest could not collect all tests, or collects other marks than the sources declare.
        ValueError: if no test is marked, or one wrongly.
    """
    import pytest

    # As `python -m pytest` in that folder: processes that tests start inherit it, and import tests from it.
    sys.path.insert(0, str(tests.parent.resolve()))
    declared = declared_marks(tests)
    roots = [path.resolve() for path in chosen or [tests]]
    files = {mark: (tests.parent / mark.test.partition("::")[0]).resolve() for mark in declared}
    wanted = {mark for mark, file in files.items() if any(file.is_relative_to(root) for root in roots)}
    if not wanted:
        raise ValueError(f"no test of {', '.join(str(path) for path in chosen) or tests} is marked")
    outcomes = Outcomes()
    arguments = ["-m", "supports", f"--rootdir={tests.parent}", *sorted({str(files[mark]) for mark in wanted})]
    ended = pytest.main(arguments, plugins=[outcomes])
    if ended not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {ended!r}")
    if wanted != outcomes.counts.keys():
        differing = sorted(wanted ^ outcomes.counts.keys())
        raise RuntimeError(f"the sources declare other marks than pytest collects: {differing[0]}")
    return outcomes.counts


def results(
    declared: Collection[Mark], counts: Mapping[Mark, Mapping[str, int]], previous: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A record for each mark: its new outcomes, or else those of before, or else none."""
    never = {"passed": 0, "failed": 0, "skipped": 0, "date": None}
    kept = {Mark(result["feature"], result["where"], result["test"]): result for result in previous}
    today = datetime.date.today().isoformat()
    return [
        {**asdict(mark), **({**counts[mark], "date": today} if mark in counts else kept.get(mark, never))}
        for mark in sorted(declared)
    ]


def status(cases: Sequence[Mapping[str, Any]]) -> str:
    """What the outcomes of a cell's tests say; "" without a test."""
    if any(case["failed"] for case in cases):
        return "fails"
    if any(case["skipped"] or not case["passed"] for case in cases):
        return "not run"
    return "works" if cases else ""


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown: a line a feature, a column for each "where"."""
    recorded: list[Mapping[str, Any]] = record["results"]
    lines = [f"| | {' | '.join(WHERE)} |", "|---" * (len(WHERE) + 1) + "|"]
    for feature in sorted({result["feature"] for result in recorded}, key=str.lower):
        of_feature = [result for result in recorded if result["feature"] == feature]
        cells = [status([result for result in of_feature if result["where"] == where]) for where in WHERE]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    with_what = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    passed = sum(result["passed"] for result in recorded)
    dates = sorted({result["date"] for result in recorded if result["date"]})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return "\n".join([*lines, "", f"{passed} cases passed, {when}: {with_what}."])


def write_table(page: Path, record: Mapping[str, Any]) -> str:
    """The text of a page with the record's table between its markers.

    Raises:
        ValueError: if the page has no markers.
    """
    head, begin, rest = page.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{table(record)}\n\n{END}{tail}"


def versions() -> dict[str, str]:
    """What the outcomes hold for."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"Python": platform.python_version()}
    for package in ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {**found, "CUDA device": device}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="files and folders whose marked tests are run: all")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "serving.md")
    parser.add_argument("--record", type=Path, default=ROOT / "docs" / "support_matrix.json")
    options = parser.parse_args(arguments)
    try:
        if not options.render:
            counts, present = run(options.tests, options.files), versions()
            # Read only now, for another run may have ended meanwhile. What holds for other versions is not kept.
            before = json.loads(options.record.read_text()) if options.record.exists() else {}
            previous = before["results"] if before.get("versions") == present else []
            record = {"versions": present, "results": results(declared_marks(options.tests), counts, previous)}
            options.record.write_text(json.dumps(record, indent=1) + "\n")
        record = json.loads(options.record.read_text())
        options.page.write_text(write_table(options.page, record))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"support_matrix.py: {error}")


if __name__ == "__main__":
    main()
