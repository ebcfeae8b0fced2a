"""Which mixes fit, and what is said about those that do not."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchrec_mpe.upstream.versions as versions
from torchrec_mpe.upstream.versions import check_versions, parse_release, version_problems, warn_or_raise_at_import

TESTED = {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"}


def test_this_installation_fits() -> None:
    assert check_versions() == []


@pytest.mark.parametrize(
    ("torch", "fbgemm", "torchrec"),
    [
        ("2.11.0", "1.6.0", "1.6.1"),
        ("2.12.1", "1.7.0", "1.7.0"),
        ("2.13.0", "1.8.0", "1.8.0"),
        ("2.14.0", "1.9.0", "1.9.2"),
    ],
)
@pytest.mark.parametrize("build", ["fbgemm-gpu", "fbgemm-gpu-cpu", "FBGEMM_GPU"])
def test_mixes_of_the_table_fit(torch: str, fbgemm: str, torchrec: str, build: str) -> None:
    assert check_versions({"torch": torch, build: fbgemm, "torchrec": torchrec}) == []


NEWEST = {"torch": "2.14.1+cu130", "fbgemm-gpu-cpu": "1.9.0", "torchrec": "1.9.2"}


def test_the_mixes_that_were_run() -> None:
    assert versions.mix_that_was_run(TESTED) is versions.TESTED_MIX
    assert versions.mix_that_was_run(NEWEST) is versions.NEWEST_MIX is not versions.TESTED_MIX
    assert versions.mix_that_was_run({**TESTED, "torch": "2.13.1+cpu"}) is None
    assert versions.mix_that_was_run({"torch": "2.14.0", "fbgemm-gpu": "1.9.0", "torchrec": "1.9.2"}) is None
    assert versions.mix_that_was_run({"torch": "2.13.0"}) is None
    assert all(mix.tests for mix in versions.MIXES if mix.run is not None)


def test_remedies_for_a_torch_that_no_fbgemm_serves_lead_to_one_mix() -> None:
    """What `pip install torch torchrec fbgemm-gpu-cpu` gives: both builds of fbgemm, and a torch without any."""
    installed = {"torch": "2.15.0", "fbgemm-gpu": "1.9.0", "fbgemm-gpu-cpu": "1.9.0", "torchrec": "1.9.2"}
    builds, torch = version_problems(installed)
    assert builds.remedy == "run pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu, before anything else"
    assert "torch==2.14.1" in torch.remedy and "==1.9.0" in torch.remedy and "torchrec==1.9.2" in torch.remedy
    assert versions.mix_to_install("2.15.0") is versions.NEWEST_MIX
    assert versions.mix_to_install("2.12.0").torch == (2, 12) and versions.mix_to_install("?") is versions.TESTED_MIX
    (cpu, torch) = version_problems({"torch": "2.15.0+cpu", "fbgemm-gpu": "1.9.0", "torchrec": "1.9.2"})
    assert cpu.remedy == "run pip uninstall -y fbgemm-gpu" and "fbgemm-gpu-cpu==1.9.0" in torch.remedy


def test_torch_without_fbgemm_is_told_in_words() -> None:
    (problem,) = check_versions({"torch": "2.15.0+cpu", "fbgemm-gpu-cpu": "1.9.0", "torchrec": "1.9.2"})
    assert "there is no fbgemm for torch 2.15 yet" in problem
    assert "torch 2.14, fbgemm 1.9 and torchrec 1.9" in problem
    (problem,) = check_versions({"torch": "2.9.1", "fbgemm-gpu": "1.4.0", "torchrec": "1.4.0"})
    assert "torch 2.9 is older than 2.11" in problem


def test_versions_are_compared_as_numbers() -> None:
    (problem,) = version_problems({**TESTED, "fbgemm-gpu-cpu": "1.10.0"})
    assert problem.message == "torch 2.13.0+cpu, fbgemm-gpu-cpu 1.10.0 and torchrec 1.8.0 do not fit together"
    assert problem.remedy.endswith("run pip install fbgemm-gpu-cpu==1.8.0")
    (newest,) = check_versions({"torch": "2.100.0", "fbgemm-gpu": "1.8.0", "torchrec": "1.8.0"})
    assert "no fbgemm for torch 2.100" in newest
    assert parse_release("2.15.0.dev20260101+cu130") == (2, 15, 0)
    assert parse_release("unknown") is None


def test_both_packages_wrong_are_one_problem() -> None:
    (problem,) = version_problems({"torch": "2.12.0+cu130", "fbgemm-gpu": "1.8.0", "torchrec": "1.8.0"})
    assert "'fbgemm-gpu==1.7.*'" in problem.remedy and "'torchrec==1.7.*'" in problem.remedy
    assert "--no-deps" not in problem.remedy


@pytest.mark.parametrize("absent", ["torch", "fbgemm-gpu-cpu", "torchrec"])
def test_missing_package_raises_with_the_command(absent: str) -> None:
    installed = {name: version for name, version in TESTED.items() if name != absent}
    with pytest.raises(
        ImportError, match=rf"{absent} is not installed: run .*pip install (--no-deps )?{absent}=="
    ) as error:
        warn_or_raise_at_import(installed)
    assert "\n" not in str(error.value)


def test_nothing_installed_is_one_sentence() -> None:
    (problem,) = version_problems({})
    assert problem.missing
    assert re.search("torch, fbgemm-gpu(-cpu)? and torchrec are not installed", problem.message)


def test_missing_fbgemm_for_an_unknown_torch_offers_a_mix_that_exists() -> None:
    (problem,) = version_problems({"torch": "2.15.0+cpu"})
    assert problem.missing and "==1.9.0" in problem.remedy and "1.8" not in problem.remedy


def test_misfit_warns_and_does_not_raise() -> None:
    with pytest.warns(RuntimeWarning, match="torch 2.13 goes with fbgemm 1.8"):
        warn_or_raise_at_import({**TESTED, "fbgemm-gpu-cpu": "1.7.0"})


def test_good_mix_is_silent(recwarn: pytest.WarningsRecorder) -> None:
    warn_or_raise_at_import(TESTED)
    assert not recwarn.list


def test_both_builds_and_genai() -> None:
    (problem,) = version_problems({**TESTED, "fbgemm-gpu": "1.8.0"})
    assert "fbgemm-gpu and fbgemm-gpu-cpu are both installed" in problem.message
    assert "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && pip install fbgemm-gpu-cpu==1.8.0" in problem.remedy
    (problem,) = version_problems({"torch": "2.13.0", "fbgemm-gpu-genai": "1.8.0", "torchrec": "1.8.0"})
    assert problem.missing and "genai build of fbgemm has no embedding operators" in problem.message


def test_cpu_torch_with_cuda_fbgemm() -> None:
    (problem,) = check_versions({"torch": "2.13.0+cpu", "fbgemm-gpu": "1.8.0", "torchrec": "1.8.0"})
    assert "is a CPU build, fbgemm-gpu is a CUDA build" in problem


@pytest.mark.parametrize(("python", "fits"), [((3, 9), False), ((3, 10), True), ((3, 13), True), ((3, 14), False)])
def test_python(python: tuple[int, int], fits: bool) -> None:
    assert (version_problems(TESTED, python) == []) == fits


def test_unreadable_versions_are_left_alone() -> None:
    assert check_versions({"torch": "unknown", "fbgemm-gpu": "unknown", "torchrec": "unknown"}) == []


def test_every_file_is_of_the_oldest_python() -> None:
    """Syntax only: the tests run on one Python, the package promises several."""
    root = Path(__file__).parents[2]
    for folder in ("torchrec_mpe", "benchmarks", "examples", "tests", "tools"):
        for file in (root / folder).rglob("*.py"):
            ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=versions.OLDEST_PYTHON)


def test_importing_versions_imports_none_of_the_three() -> None:
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1])['check_versions']();"
        "print([m for m in ('torch', 'fbgemm_gpu', 'torchrec', 'numpy') if m in sys.modules])"
    )
    # By path, so that the package itself is not imported.
    file = str(Path(versions.__file__))
    run = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


def test_the_installer_installs_the_tested_mix() -> None:
    script = (Path(__file__).parents[2] / "tools" / "install.sh").read_text()
    pins = tuple(re.search(rf"\{{{name}:=([^}}]+)\}}", script)[1] for name in ("TORCH", "FBGEMM", "TORCHREC"))
    assert pins == versions.TESTED_MIX.run
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert "TORCH={} FBGEMM={} TORCHREC={}".format(*versions.NEWEST_MIX.run) in makefile
