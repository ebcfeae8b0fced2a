"""``torchrec-mpe doctor``: what this machine has, what does not work, and what to do about it.

Torch, fbgemm and torchrec are imported in a process of their own, so that even a crash in one of their libraries ends
up as a sentence.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from torchrec_mpe.app.hardware import cpu_fields, cpu_name
from torchrec_mpe.upstream.versions import (
    FBGEMM_BUILDS,
    FBGEMM_GENAI_BUILDS,
    MIXES,
    TORCHREC_BUILDS,
    __version__,
    install_command,
    installed_versions,
    is_cpu_build,
    mix_for_torch,
    mix_that_was_run,
    mix_to_install,
    version_problems,
)

PROBE_SECONDS = 180
_LEAST_TEMPORARY_BYTES = 1 << 30
_CPU_FEATURES = {"avx2": "AVX2", "fma": "FMA", "avx512f": "AVX512F", "avx512vbmi": "VBMI"}
_BACKENDS = {"reference": "plain torch", "cpu": "C++ operators", "triton": "Triton kernels"}


@dataclass
class Findings:
    """What the doctor prints: facts by section, notes, and problems with their remedies."""

    sections: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, section: str, name: str, value: str) -> None:
        """A fact."""
        self.sections.setdefault(section, {})[name] = value

    def as_json(self) -> str:
        """Everything, as an object with ok, sections, notes and problems."""
        problems = [{"problem": message, "remedy": remedy} for message, remedy in self.problems]
        everything = {"ok": not problems, "sections": self.sections, "notes": self.notes, "problems": problems}
        return json.dumps(everything, indent=2)

    def as_text(self) -> str:
        """Everything, for a terminal; commands stay on one line so that they can be copied."""
        lines = []
        for section, facts in self.sections.items():
            width = max(len(name) for name in facts) + 2
            lines += [section, *(f"  {name:<{width}}{value}" for name, value in facts.items()), ""]
        if self.notes:
            lines += ["Notes", *(f"  - {note}" for note in self.notes), ""]
        if not self.problems:
            return "\n".join([*lines, "No problems found."])
        lines.append(f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''} found")
        for number, (message, remedy) in enumerate(self.problems, 1):
            lines += [f"{number:>3}. {message}", f"     Remedy: {remedy}"]
        return "\n".join(lines)


def doctor(stream: TextIO | None = None, as_json: bool = False, installed: Mapping[str, str] | None = None) -> int:
    """Print what this machine has and what is wrong with it.

    Args:
        stream (Optional[TextIO]): where to print, standard output by default.
        as_json (bool): the same as JSON.
        installed (Optional[Mapping[str, str]]): versions by distribution name; what is installed by default.

    Returns:
        int: 0 if no problem was found, 1 otherwise.
    """
    found = Findings()
    installed = installed_versions() if installed is None else installed
    _versions(found, installed)
    steps = run_probe()
    _operators(found, installed, steps)
    _cpu(found)
    _gpus(found, steps)
    _disk(found)
    print(found.as_json() if as_json else found.as_text(), file=stream or sys.stdout)
    return 1 if found.problems else 0


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``doctor`` command; its ``run`` takes the parsed options and returns the exit code."""
    text = "check the installation and this machine, and say what to do about each problem"
    parser = subparsers.add_parser("doctor", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=lambda options: doctor(as_json=options.json))


def _runs() -> str:
    """The mixes that were run, in words."""
    return " or ".join("torch {}, fbgemm {} and torchrec {}".format(*mix.run) for mix in MIXES if mix.run is not None)


def _versions(found: Findings, installed: Mapping[str, str]) -> None:
    """Releases, and whether they fit."""
    found.add("Versions", "torchrec_mpe", __version__)
    found.add("Versions", "Python", platform.python_version())
    found.add("Versions", "system", f"{platform.platform()}")
    for title, names in (
        ("torch", ("torch",)),
        ("fbgemm", FBGEMM_BUILDS + FBGEMM_GENAI_BUILDS),
        ("torchrec", TORCHREC_BUILDS),
    ):
        there = [name for name in names if name in installed]
        listed = ", ".join(installed[name] + (f" ({name})" if name != title else "") for name in there)
        found.add("Versions", title, listed or "not installed")
    problems = version_problems(installed)
    found.problems += [(problem.message, problem.remedy) for problem in problems]
    if (known := mix_that_was_run(installed)) is not None and not problems:
        mix = f"fits: run with exactly these releases, {known.tests}"
    elif any(problem.missing for problem in problems):
        mix = "incomplete"
    elif mix_for_torch(installed["torch"]) is None or any("together" in problem.message for problem in problems):
        mix = "does not fit"
    else:
        mix = f"fits by the version table, but the tests were not run with these releases; they were with {_runs()}"
    found.add("Versions", "mix", mix)
    if "fbgemm-gpu-cpu" in installed and "fbgemm-gpu" not in installed:
        found.notes.append(
            "'pip check' says that torchrec requires fbgemm-gpu, which is not installed. That is expected: "
            "fbgemm-gpu-cpu provides the same package under another name."
        )


# --- The process that imports torch, fbgemm and torchrec ---


def probe() -> None:
    """Try each import and operator in turn; print a line of JSON before and after each step."""
    # Each line starts on a new one, because libraries may print without ending theirs.
    facts: dict[str, Any] = {}
    for name, step in _STEPS.items():
        print("\n" + json.dumps({"begin": name}), flush=True)
        try:
            facts[name] = step(facts)
            outcome: dict[str, Any] = {"end": name, "facts": facts[name]}
        # FBGEMM and torch raise much more than Exception's usual children when a library does not load.
        except BaseException as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            outcome = {"end": name, "error": f"{type(error).__name__}: {error}", "missing": missing}
        print("\n" + json.dumps(outcome), flush=True)
        if "error" in outcome and name == "torch":
            return


def _probe_torch(_: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            gpus.append({"name": gpu.name, "bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"})
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    return {"version": torch.__version__, "cuda": torch.version.cuda or torch.version.hip, "gpus": gpus, "gloo": gloo}


def _probe_fbgemm(_: Mapping[str, Any]) -> dict[str, Any]:
    import fbgemm_gpu

    return {"version": str(getattr(fbgemm_gpu, "__version__", "unknown"))}


def _lookup_one_row(device: str) -> dict[str, Any]:
    """Look up row 1 of a table of 2 rows and compare."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
    if device == "cuda":
        place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
    lookup = SplitTableBatchedEmbeddingBagsCodegen(
        [(2, 4, *place)], optimizer=EmbOptimType.EXACT_SGD, learning_rate=0.1, device=torch.device(device)
    )
    rows = torch.arange(8.0, device=device).view(2, 4)
    lookup.split_embedding_weights()[0].copy_(rows)
    result = lookup(torch.tensor([1], device=device), torch.tensor([0, 1], device=device))
    if not torch.equal(result.detach(), rows[1:]):
        raise RuntimeError(f"the lookup of {rows[1].tolist()} gave {result.tolist()}")
    return {}


def _probe_gpu_lookup(facts: Mapping[str, Any]) -> dict[str, Any]:
    if not facts["torch"]["gpus"]:
        return {"skipped": "torch sees no GPU"}
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("fbgemm-gpu-cpu")
        return {"skipped": "fbgemm is the CPU build"}
    except PackageNotFoundError:
        return _lookup_one_row("cuda")


def _probe_torchrec(_: Mapping[str, Any]) -> dict[str, Any]:
    import torchrec

    return {"version": str(getattr(torchrec, "__version__", "unknown"))}


def _probe_backends(_: Mapping[str, Any]) -> dict[str, Any]:
    from importlib.util import find_spec

    from torchrec_mpe.ops import library
    from torchrec_mpe.ops.backends import available_backends

    available = [name for name in available_backends() if name != "triton" or find_spec("triton") is not None]
    capability = library.cpu_capability() if library.is_loaded() else None
    return {"available": available, "problem": library.problem(), "capability": capability}


_STEPS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "torch": _probe_torch,
    "fbgemm": _probe_fbgemm,
    "lookup": lambda _: _lookup_one_row("cpu"),
    "GPU lookup": _probe_gpu_lookup,
    "torchrec": _probe_torchrec,
    "backends": _probe_backends,
}


def run_probe() -> dict[str, dict[str, Any]]:
    """Run :func:`probe` in a process of its own: per step its facts, an error, or how the process ended in it."""
    path = os.pathsep.join(folder for folder in sys.path if folder)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-W", "ignore", "-c", "from torchrec_mpe.app.cli.doctor import probe; probe()"]
    # Files, not pipes: a child that is stopped may leave children of its own behind that hold a pipe open.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        try:
            code: int | None = subprocess.run(
                command, stdout=output, stderr=errors, stdin=subprocess.DEVNULL, env=environment, timeout=PROBE_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        output.seek(0)
        errors.seek(0)
        said, complained = output.read(), errors.read()
    steps: dict[str, dict[str, Any]] = {}
    running: str | None = "start"
    for line in said.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # something that a library printed
        if isinstance(entry, dict) and "begin" in entry:
            running = entry["begin"]
        elif isinstance(entry, dict) and "end" in entry:
            steps[entry["end"]], running = entry, None
    if running is not None:
        steps[running] = {"ended": _how_it_ended(code), "error": (complained.strip().splitlines() or [""])[-1]}
    return steps


def _how_it_ended(code: int | None) -> str:
    """The end of a process in words."""
    if code is None:
        return f"did not finish within {PROBE_SECONDS} seconds"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"crashed ({signal.Signals(-code).name})"
    except ValueError:
        return f"crashed (signal {-code})"


def explain(what: str, step: Mapping[str, Any], installed: Mapping[str, str]) -> tuple[str, str]:
    """A failed step in plain words, and what to do."""
    error = " ".join(str(step.get("error") or "").split())
    mix = mix_to_install(installed.get("torch", ""))
    cpu = is_cpu_build(installed)
    again = install_command(mix, cpu)
    reinstall = f"install releases that fit together, best in a fresh virtual environment: {again}"
    if step.get("missing"):
        module = str(step["missing"])
        package = {"yaml": "PyYAML", "pyre_extensions": "pyre-extensions"}.get(
            module.split(".")[0], module.split(".")[0]
        )
        return f"{what} does not work, because the Python package {module} is missing", f"run pip install {package}"
    if "undefined symbol" in error or ("no attribute" in error and "fbgemm" in error):
        return f"{what} does not work: its library was built for another torch ({error})", reinstall
    if library := re.search(r"(lib(?:cu|nv|nccl)[\w.+-]*): cannot open shared object", error):
        return (
            f"{what} does not work: it is a CUDA build and {library[1]} is not on this machine",
            f"without a GPU install the CPU builds: {install_command(mix, True)}; "
            "with one, install torch's CUDA build first",
        )
    if "GLIBC" in error or "CXXABI" in error:
        return (
            f"{what} does not work: its library needs a newer Linux ({error})",
            "use a newer Linux or container image",
        )
    if "no kernel image" in error:
        return (
            f"{what} does not work: the installed build has no code for this GPU's compute capability",
            "install a build for it, FBGEMM's installation page lists them; the CPU path works without",
        )
    if "SIGILL" in str(step.get("ended")):
        return f"{what} uses a processor instruction that this CPU does not have", "use a machine with AVX2 and FMA"
    how = step.get("ended") or "fails"
    return f"{what} {how}" + (f" ({error})" if error else ""), reinstall


# --- What the findings say ---


def _operators(found: Findings, installed: Mapping[str, str], steps: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether everything imports and runs."""
    titles = {
        "start": "torchrec_mpe itself",
        "torch": "importing torch",
        "fbgemm": "importing fbgemm_gpu",
        "lookup": "fbgemm's lookup on the CPU",
        "GPU lookup": "fbgemm's lookup on the GPU",
        "torchrec": "importing torchrec",
        "backends": "importing torchrec_mpe.ops",
    }
    absent = {
        "torch": "torch" not in installed,
        "fbgemm": not any(name in installed for name in FBGEMM_BUILDS),
        "torchrec": not any(name in installed for name in TORCHREC_BUILDS),
    }
    absent["lookup"] = absent["GPU lookup"] = absent["fbgemm"]
    broken_fbgemm = False
    for name, title in titles.items():
        step = steps.get(name)
        if absent.get(name):
            found.add("Operators", title, "not installed")
        elif step is None:
            if name != "start":
                found.add("Operators", title, "not tried")
        elif "facts" in step:
            found.add("Operators", title, str(step["facts"].get("skipped") or "works"))
        elif broken_fbgemm and name != "backends":
            # One broken library breaks all that follows: one problem is enough.
            found.add("Operators", title, "does not work")
        else:
            found.add("Operators", title, "does not work")
            found.problems.append(explain(title, step, installed))
            broken_fbgemm = name in ("fbgemm", "lookup")
    backends = steps.get("backends", {}).get("facts")
    if backends is not None:
        for backend, text in _BACKENDS.items():
            detail = f"{text}, {backends['capability']}" if backend == "cpu" and backends["capability"] else text
            why = "available" if backend in backends["available"] else "not available"
            found.add("Operators", f"backend {backend}", f"{why} ({detail})")
        if backends["problem"]:
            message, _, remedy = backends["problem"].partition(": ")
            found.problems.append((f"lookups and training steps are slow, for {message}", remedy))
    gloo = steps.get("torch", {}).get("facts", {}).get("gloo")
    if gloo is not None:
        found.add("Operators", "gloo", "available" if gloo else "not available")
        if not gloo:
            message = "this torch has no gloo, which training on several CPU processes needs"
            remedy = "install torch from pytorch.org or PyPI, whose Linux and macOS builds have it"
            found.problems.append((message, remedy))


def _cpu(found: Findings) -> None:
    """Processor, cores and memory."""
    flags = cpu_fields().get("flags", "").split()
    found.add("Machine", "CPU", cpu_name())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found.add("Machine", "cores", f"{usable} usable of {os.cpu_count()}")
    if flags and platform.machine().lower() in ("x86_64", "amd64"):
        has = {title: flag in flags for flag, title in _CPU_FEATURES.items()}
        listed = ", ".join(f"{title} {'yes' if there else 'no'}" for title, there in has.items())
        found.add("Machine", "instructions", listed)
        if not (has["AVX2"] and has["FMA"]):
            found.notes.append(
                "This CPU lacks AVX2 or FMA: FBGEMM's CPU operators are slow or do not run without them."
            )
    else:
        found.add("Machine", "instructions", f"{platform.machine()}, features unknown")
    if (memory := _memory_bytes()) is not None:
        found.add("Machine", "memory", f"{memory / 2**30:.1f} GiB")


def _memory_bytes() -> int | None:
    """Main memory, or the container's limit if that is less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def _driver_gpus() -> list[str]:
    """The GPUs that nvidia-smi lists; empty without it."""
    if (command := shutil.which("nvidia-smi")) is None:
        return []
    try:
        listed = subprocess.run(
            [command, "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()] if listed.returncode == 0 else []


def _gpus(found: Findings, steps: Mapping[str, Mapping[str, Any]]) -> None:
    """GPUs that torch can use, and those that it cannot."""
    torch = steps.get("torch", {}).get("facts")
    driver = _driver_gpus()
    for index, gpu in enumerate(torch["gpus"] if torch else []):
        text = f"{gpu['name']}, {gpu['bytes'] / 2**30:.0f} GiB, compute capability {gpu['capability']}"
        found.add("Machine", f"GPU {index}", text)
    if torch and torch["gpus"]:
        return
    found.add("Machine", "GPUs", f"{'; '.join(driver)} (not used by torch)" if driver else "none")
    if driver and torch and torch["cuda"] is None:
        found.notes.append(
            "There is a GPU, but this torch is a CPU-only build, so everything runs on the CPU. To use the GPU, "
            f"install the CUDA builds: {install_command(mix_to_install(torch['version']), False)}"
        )
    elif driver and torch:
        found.problems.append(
            (
                f"torch was built for CUDA {torch['cuda']} but cannot use the GPU that nvidia-smi lists",
                "update the NVIDIA driver, or install a torch built for the CUDA version that nvidia-smi shows; also "
                "check that CUDA_VISIBLE_DEVICES is not empty",
            )
        )


def _disk(found: Findings) -> None:
    """Whether temporary files and results can be written."""
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        remedy = "free some space, or set TMPDIR to a folder that you may write to"
        found.problems.append((f"temporary files cannot be written ({error})", remedy))
        return
    found.add("Machine", "temporary", f"{folder}, {free / 2**30:.1f} GiB free")
    if free < _LEAST_TEMPORARY_BYTES:
        remedy = "free some space, or set TMPDIR to a folder with more"
        found.problems.append((f"{folder} has only {free / 2**20:.0f} MiB free", remedy))
    try:
        here = Path.cwd()
    except OSError:
        found.notes.append("The current folder does not exist any more: change to another one.")
        return
    writable = os.access(here, os.W_OK)
    found.add("Machine", "this folder", f"{here}, {'writable' if writable else 'not writable'}")
    if not writable:
        found.notes.append(f"Nothing can be written to {here}: give the other commands an output folder elsewhere.")
