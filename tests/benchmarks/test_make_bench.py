"""`make bench` runs every benchmark, so every one that a page cites."""

import re
import subprocess
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_SCRIPT = re.compile(r"benchmarks/(\w+)\.py(?: +([^`\n]*))?")


_LOGS = ("CIAO=ciao.csv", "JOURNEY=data")


def _commands(*variables: str) -> list[tuple[str, str]]:
    """Scripts and their arguments, as make would run them."""
    planned = subprocess.run(
        ["make", "--dry-run", "--always-make", "bench", *variables],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [(script, arguments.strip()) for script, arguments in _SCRIPT.findall(planned.stdout)]


def _scripts() -> set[str]:
    started = {"serving_variants"}  # by serve.py
    files = (_ROOT / "benchmarks").glob("*.py")
    return {file.stem for file in files if '__name__ == "__main__"' in file.read_text()} - started


def test_every_benchmark_is_run_and_every_cited_one_is_there() -> None:
    ran = {script for script, _ in _commands(*_LOGS)}
    assert ran == _scripts()
    for page in (_ROOT / "README.md", _ROOT / "CONTRIBUTING.md", *(_ROOT / "docs").glob("*.md")):
        cited = {script for script, _ in _SCRIPT.findall(page.read_text())}
        assert cited <= ran, f"{page.name} cites benchmarks that make bench does not run"


def test_cited_arguments_are_those_that_are_run() -> None:
    ran = _commands(*_LOGS)
    text = (_ROOT / "docs" / "results.md").read_text()
    for script, cited in re.findall(r"`python\s+benchmarks/(\w+)\.py\s*([^`]*)`", text):
        assert any(name == script and set(cited.split()) <= set(arguments.split()) for name, arguments in ran), (
            f"make bench does not run {script}.py {cited}"
        )


def test_a_quick_run_records_nothing_and_is_quick_everywhere() -> None:
    for script, arguments in _commands("BENCH_ARGS=--quick", *_LOGS):
        assert "--json" not in arguments
        assert "--quick" in arguments or script == "communication", f"{script} would run in full"


def test_records_are_those_that_pages_are_made_from() -> None:
    def records(*variables: str) -> list[str]:
        found = [
            re.search(r"--json benchmarks/results/([\w.]+)\.json", arguments) for _, arguments in _commands(*variables)
        ]
        return [record[1] for record in found if record]

    committed = {file.name.partition(".")[0] for file in (_ROOT / "benchmarks" / "results").glob("*.json")}
    everything = records(*_LOGS)
    assert len(everything) == len(set(everything)) and committed <= set(everything)
    assert set(records(*_LOGS, "BENCH_MACHINE=other")) == {f"{record}.other" for record in everything}
    # Without Ciao's ratings the record of cache.py would lack its AUC.
    assert set(everything) - set(records()) == {
        "accuracy_ciao",
        "compress_ciao",
        "compress_ciao_128",
        "compress_ciao_64",
        "compress_ciao_dlrm",
        "compress_journey",
        "convert_ciao",
        "cache",
    }
    assert "cache" in {script for script, _ in _commands()}
