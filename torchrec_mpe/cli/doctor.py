"""`torchrec-mpe doctor`: what is installed, what works, and what is wrong in plain words."""

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from torchrec_mpe import versions

_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512vbmi")
_MISSING_BACKENDS = {
    "cpu": "this version has no C++ kernels: lookups and training run on the reference",
    "triton": "this version has no Triton kernels: lookups and training run on the reference, also on a GPU",
}


@dataclass
class Findings:
    """Facts in order of printing, and problems with their remedies."""

    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser("doctor", help="show versions, backends and hardware, and say what is wrong")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=lambda options: doctor(as_json=options.json))


def doctor(stream: TextIO | None = None, *, as_json: bool = False) -> int:
    """Print what was found; returns 0, or 1 if something is wrong. Runs where torch, fbgemm or torchrec is missing."""
    stream = stream or sys.stdout
    found = examine()
    if as_json:
        document = {"facts": found.facts, "notes": found.notes, "problems": found.problems}
        print(json.dumps(document, indent=2), file=stream)
        return 1 if found.problems else 0
    width = max(map(len, found.facts))
    for name, value in found.facts.items():
        print(f"{name.ljust(width)}  {value}", file=stream)
    for note in found.notes:
        print(f"note: {note}", file=stream)
    print(file=stream)
    if not found.problems:
        print("No problems found.", file=stream)
        return 0
    for number, problem in enumerate(found.problems, 1):
        print(f"{number}. {problem}", file=stream)
    return 1


def examine() -> Findings:
    """Look at versions, packages, hardware and disk; never raises for what it finds."""
    found = Findings()
    found.facts["torchrec_mpe"] = versions.__version__
    found.facts["Python"] = f"{platform.python_version()} ({sys.executable})"
    found.facts["system"] = platform.platform()
    installed = versions.installed_versions()
    for name, version in installed.items():
        found.facts[name] = version
    problems = versions.check_versions(installed)
    found.problems += problems
    if not problems:
        tested = "tested" if versions.was_run(installed) else "by the version table; not run by our tests"
        found.facts["mix"] = f"fits ({tested})"
    if "fbgemm-gpu-cpu" in installed:
        found.notes.append("pip check says that torchrec misses fbgemm-gpu: expected with the CPU build of FBGEMM")
    torch = _try(found, "torch", lambda: importlib.import_module("torch"))
    if torch is not None:
        _try(found, "fbgemm operators", lambda: _lookup(torch))
        _try(found, "torchrec", lambda: importlib.import_module("torchrec") and "")
        _try(found, "op backends", _backends)
        found.facts["gloo"] = "available" if torch.distributed.is_gloo_available() else "missing from this torch"
    found.facts["CPU"] = _cpu()
    found.facts["memory"] = _memory()
    _gpus(found, torch)
    _disk(found)
    return found


def _try(found: Findings, name: str, check: Callable[[], Any]) -> Any:
    """Run a check; an exception becomes a problem in one sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = check()
        except Exception as error:  # a broken installation fails in any way it likes
            sentence = " ".join(str(error).split())[:300]
            if not found.problems or name in ("fbgemm operators", "op backends"):
                found.problems.append(
                    f"{name}: {type(error).__name__}: {sentence}. Install a mix that fits: {versions.install_command()}"
                )
            return None
    if isinstance(result, str) and result:
        found.facts[name] = result
    return result


def _lookup(torch: Any) -> str:
    """Look one row up in a fused TBE."""
    training = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    tbe = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(2, 4, common.EmbeddingLocation.HOST, training.ComputeDevice.CPU)], device=torch.device("cpu")
    )
    tbe.split_embedding_weights()[0].fill_(1.0)
    row = tbe(torch.tensor([1]), torch.tensor([0, 1]))
    if row.tolist() != [[1.0] * 4]:
        raise RuntimeError(f"a lookup of a row of ones gave {row.tolist()}")
    return "load and run"


def _backends() -> str:
    available = importlib.import_module("torchrec_mpe.ops").available_backends()
    missing = [f"{name}: {reason}" for name, reason in _MISSING_BACKENDS.items() if name not in available]
    return f"{', '.join(available)} ({'; '.join(missing)})" if missing else ", ".join(available)


def _cpu() -> str:
    name, flags = platform.processor() or platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = f" {value} "
    except OSError:
        return f"{name}, {os.cpu_count()} cores"
    has = [feature for feature in _CPU_FEATURES if f" {feature} " in flags]
    return f"{name}, {os.cpu_count()} cores, {' '.join(has) or 'no AVX2'}"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"


def _gpus(found: Findings, torch: Any) -> None:
    smi = shutil.which("nvidia-smi")
    driver_sees = False
    if smi:
        result = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
        driver_sees = result.returncode == 0 and "GPU" in result.stdout
    if torch is not None and torch.cuda.is_available():
        names = []
        for k in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(k)
            memory = properties.total_memory / 2**30
            names.append(f"{properties.name}, {memory:.0f} GiB, compute {properties.major}.{properties.minor}")
        found.facts["GPUs"] = "; ".join(names)
        return
    found.facts["GPUs"] = "none that torch can use"
    if driver_sees and torch is not None:
        build = "is a CPU build" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        found.problems.append(
            f"nvidia-smi lists a GPU that torch cannot use: torch {torch.__version__} {build}; install a CUDA build "
            f"that fits the driver: {versions.install_command(cpu=False)}"
        )


def _disk(found: Findings) -> None:
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free / 2**30
    found.facts["temporary folder"] = f"{folder}, {free:.1f} GiB free"
    if not os.access(folder, os.W_OK):
        found.problems.append(f"the temporary folder {folder} cannot be written: set TMPDIR to one that can")
    elif free < 1:
        found.problems.append(f"the temporary folder {folder} has less than 1 GiB free: make room, or set TMPDIR")
