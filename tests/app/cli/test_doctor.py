"""The doctor on this machine, on faked installations and with broken libraries."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest

from torchrec_mpe.app.cli import doctor as module
from torchrec_mpe.app.cli.doctor import add_parser, doctor, explain, run_probe

TESTED = {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"}
WORKS: dict[str, Any] = {
    "torch": {"facts": {"version": "2.13.0+cpu", "cuda": None, "gpus": [], "gloo": True}},
    "fbgemm": {"facts": {"version": "1.8.0"}},
    "lookup": {"facts": {}},
    "GPU lookup": {"facts": {"skipped": "torch sees no GPU"}},
    "torchrec": {"facts": {"version": "1.8.0"}},
    "backends": {"facts": {"available": ["reference", "cpu"], "problem": None, "capability": "avx2"}},
}


def examine(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], steps: dict[str, Any] | None = None
) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and text of a doctor who finds ``steps``."""
    monkeypatch.setattr(module, "run_probe", lambda: WORKS if steps is None else steps)
    as_json, as_text = io.StringIO(), io.StringIO()
    code = doctor(as_json, as_json=True, installed=installed)
    assert doctor(as_text, installed=installed) == code
    return code, json.loads(as_json.getvalue()), as_text.getvalue()


def test_this_machine() -> None:
    """Really imports and looks up."""
    stream = io.StringIO()
    code = doctor(stream)
    text = stream.getvalue()
    assert code == 0, text
    assert text.endswith("No problems found.\n")
    assert "fbgemm's lookup on the CPU  works" in text
    assert "backend reference           available" in text


def test_good_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    code, found, text = examine(monkeypatch, TESTED)
    assert code == 0 and found["ok"] and found["problems"] == []
    assert found["sections"]["Versions"]["mix"].startswith("fits: run with exactly these releases, all tests")
    assert any("pip check" in note for note in found["notes"])
    assert "available (C++ operators, avx2)" in text and "not available (Triton kernels)" in text


def test_operators_that_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"available": ["reference"], "problem": "lib.so is not built: run make", "capability": None}
    code, found, text = examine(monkeypatch, TESTED, {**WORKS, "backends": {"facts": facts}})
    assert code != 0 and "not available (C++ operators)" in text
    assert found["problems"] == [
        {"problem": "lookups and training steps are slow, for lib.so is not built", "remedy": "run make"}
    ]


def test_mix_that_was_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    code, found, _ = examine(monkeypatch, {"torch": "2.14.0", "fbgemm-gpu": "1.9.0", "torchrec": "1.9.2"})
    assert code == 0
    assert (
        "the tests were not run with these releases; they were with torch 2.13.0"
        in found["sections"]["Versions"]["mix"]
    )
    assert not any("pip check" in note for note in found["notes"])


def test_torch_without_fbgemm_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    code, found, text = examine(monkeypatch, {"torch": "2.15.0", "fbgemm-gpu": "1.9.0", "torchrec": "1.9.2"})
    assert code == 1
    assert "there is no fbgemm for torch 2.15 yet" in found["problems"][0]["problem"]
    assert found["sections"]["Versions"]["mix"] == "does not fit"
    assert "1. there is no fbgemm for torch 2.15 yet" in text and "Remedy: use torch 2.14" in text


def test_mismatched_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    code, found, text = examine(monkeypatch, {**TESTED, "fbgemm-gpu-cpu": "1.7.0"})
    assert code == 1 and len(found["problems"]) == 1
    assert found["sections"]["Versions"]["mix"] == "does not fit"
    assert "1 problem found" in text and "No problems" not in text


def test_missing_torchrec(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {**WORKS, "torchrec": {"error": "ModuleNotFoundError: No module named 'torchrec'", "missing": "torchrec"}}
    code, found, _ = examine(monkeypatch, {k: v for k, v in TESTED.items() if k != "torchrec"}, steps)
    assert code == 1 and len(found["problems"]) == 1  # told once
    assert found["sections"]["Versions"]["torchrec"] == "not installed"
    assert "pip install --no-deps torchrec==1.8.0" in found["problems"][0]["remedy"]


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"torch": {"error": "ModuleNotFoundError: No module named 'torch'", "missing": "torch"}}
    code, found, _ = examine(monkeypatch, {}, steps)
    assert code == 1 and len(found["problems"]) == 1
    assert found["sections"]["Versions"]["mix"] == "incomplete"


def test_both_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    code, found, _ = examine(monkeypatch, {**TESTED, "fbgemm-gpu": "1.8.0"})
    assert code == 1
    assert "overwrite each other" in found["problems"][0]["problem"]
    assert found["sections"]["Versions"]["fbgemm"] == "1.8.0 (fbgemm-gpu), 1.8.0 (fbgemm-gpu-cpu)"


def test_one_broken_library_is_one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"error": "OSError: fbgemm.so: undefined symbol: _ZN3c10"}
    code, found, _ = examine(
        monkeypatch, TESTED, {**WORKS, "fbgemm": broken, "lookup": broken, "GPU lookup": broken, "torchrec": broken}
    )
    assert code == 1 and len(found["problems"]) == 1
    assert "built for another torch" in found["problems"][0]["problem"]
    assert found["sections"]["Operators"]["fbgemm's lookup on the CPU"] == "does not work"


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (
            {"error": "OSError: libcudart.so.13: cannot open shared object file"},
            "CUDA build and libcudart.so.13 is not",
        ),
        ({"error": "ImportError: /lib/libm.so: version `GLIBC_2.38' not found"}, "needs a newer Linux"),
        ({"error": "RuntimeError: CUDA error: no kernel image is available"}, "no code for this GPU"),
        ({"error": "ModuleNotFoundError: No module named 'iopath'", "missing": "iopath"}, "package iopath is missing"),
        ({"ended": "crashed (SIGILL)", "error": ""}, "instruction that this CPU does not have"),
        ({"ended": "crashed (SIGSEGV)", "error": ""}, "it crashed (SIGSEGV)"),
        ({"error": "RuntimeError: surprise"}, "it fails (RuntimeError: surprise)"),
    ],
)
def test_plain_words(step: dict[str, str], words: str) -> None:
    message, remedy = explain("it", step, TESTED)
    assert words in message
    assert remedy


def test_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_driver_gpus", lambda: ["NVIDIA H200, 143771 MiB"])
    code, found, _ = examine(monkeypatch, TESTED)
    assert code == 0 and any("CPU-only build" in note and "fbgemm-gpu==1.8.0" in note for note in found["notes"])
    steps = {**WORKS, "torch": {"facts": {**WORKS["torch"]["facts"], "cuda": "13.0"}}}
    code, found, _ = examine(monkeypatch, TESTED, steps)
    assert code == 1 and "update the NVIDIA driver" in found["problems"][0]["remedy"]


def test_temporary_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "missing"))
    code, found, _ = examine(monkeypatch, TESTED)
    assert code == 1 and "TMPDIR" in found["problems"][0]["remedy"]


def test_library_that_crashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Even a library that ends the process is a sentence."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    steps = run_probe()
    assert steps == {"torch": {"ended": "crashed (SIGILL)", "error": ""}}


def test_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A torch of straw, an fbgemm whose library does not load, and a torchrec that lacks a package."""
    attributes = "import types\n__version__ = '2.13.0+cpu'\nversion = types.SimpleNamespace(cuda=None, hip=None)\n"
    attributes += "cuda = types.SimpleNamespace(is_available=lambda: False)\n"
    attributes += "distributed = types.SimpleNamespace(is_available=lambda: False)\nprint('hello', end='')\n"
    for name, text in {
        "torch": attributes,
        "fbgemm_gpu": "raise OSError('fbgemm.so: undefined symbol: _ZN3c10')",
        "torchrec": "import a_package_that_is_not_here",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    steps = run_probe()
    assert steps["torch"]["facts"]["gloo"] is False
    assert "undefined symbol" in steps["fbgemm"]["error"]
    assert "undefined symbol" in steps["lookup"]["error"]
    assert steps["torchrec"]["missing"] == "a_package_that_is_not_here"


def test_library_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "PROBE_SECONDS", 2)
    assert run_probe()["torch"]["ended"] == "did not finish within 2 seconds"


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "run_probe", lambda: WORKS)
    monkeypatch.setattr(module, "installed_versions", lambda: {**TESTED, "fbgemm-gpu": "1.8.0"})
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    options = parser.parse_args(["doctor", "--json"])
    assert options.run(options) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
