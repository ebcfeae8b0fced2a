"""The package's version, and the mixes of torch, fbgemm and torchrec that fit together.

Reads installed metadata only: it imports none of the three and touches no GPU.
"""

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

__version__ = "0.1.0"

OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 13)
TORCHREC_NEEDS = "tensordict torchmetrics==1.0.3 tqdm pyre-extensions iopath"

FBGEMM_BUILDS = ("fbgemm-gpu", "fbgemm-gpu-cpu", "fbgemm-gpu-nightly", "fbgemm-gpu-nightly-cpu")
# The genai builds install the same Python package without the embedding operators.
FBGEMM_GENAI_BUILDS = ("fbgemm-gpu-genai", "fbgemm-gpu-nightly-genai")
TORCHREC_BUILDS = ("torchrec", "torchrec-nightly", "torchrec-nightly-cpu")
DISTRIBUTIONS = ("torch", *FBGEMM_BUILDS, *FBGEMM_GENAI_BUILDS, *TORCHREC_BUILDS)
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Mix:
    """Releases that fit together, each (major, minor).

    Attributes:
        run (Optional[tuple[str, str, str]]): the exact torch, fbgemm and torchrec that tests were run with; None when
            the mix is known from the version table only.
        tests (str): which tests were run with them, and on which Python.
    """

    torch: tuple[int, int]
    fbgemm: tuple[int, int]
    torchrec: tuple[int, int]
    run: tuple[str, str, str] | None = None
    tests: str = ""

    def __str__(self) -> str:
        return f"torch {_dotted(self.torch)}, fbgemm {_dotted(self.fbgemm)} and torchrec {_dotted(self.torchrec)}"

    def pin(self, package: str, distribution: str) -> str:
        """A pip requirement, exact where the mix was run: ``pin("fbgemm", "fbgemm-gpu-cpu")``."""
        if self.run is not None:
            return f"{distribution}=={dict(zip(('torch', 'fbgemm', 'torchrec'), self.run, strict=True))[package]}"
        release = {"torch": self.torch, "fbgemm": self.fbgemm, "torchrec": self.torchrec}[package]
        return f"'{distribution}=={_dotted(release)}.*'"


MIXES = (
    Mix((2, 11), (1, 6), (1, 6)),
    Mix((2, 12), (1, 7), (1, 7)),
    Mix((2, 13), (1, 8), (1, 8), run=("2.13.0", "1.8.0", "1.8.0"), tests="all tests, on Python 3.11 and a CPU"),
    Mix(
        (2, 14), (1, 9), (1, 9), run=("2.14.1", "1.9.0", "1.9.2"),
        tests="the tests of `make test-newest`, on Python 3.13 and a CPU",
    ),
)  # fmt: skip
TESTED_MIX = next(mix for mix in MIXES if mix.run is not None)
NEWEST_MIX = next(mix for mix in reversed(MIXES) if mix.run is not None)


@dataclass(frozen=True)
class VersionProblem:
    """What does not fit, what to do, and whether a package is missing altogether (``message: remedy`` reads on)."""

    message: str
    remedy: str
    missing: bool = False

    def __str__(self) -> str:
        return f"{self.message}: {self.remedy}"


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def parse_release(version: str) -> tuple[int, ...] | None:
    """The numbers of a version: ``"2.13.0+cpu"`` gives (2, 13, 0); None when there are fewer than two.

    Pre-releases count as their release, so ``"2.15.0.dev20260101"`` gives (2, 15, 0).
    """
    try:
        release = Version(version).release
    except InvalidVersion:
        return None
    return release if len(release) > 1 else None


def mix_release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version, by which mixes are told apart; empty if it cannot be read."""
    return (parse_release(version) or ())[:2]


def installed_versions() -> dict[str, str]:
    """Versions by distribution name of whichever torch, fbgemm and torchrec distributions are installed.

    A package that can be imported but has no metadata (a source build) is listed under its usual name as "unknown".
    """
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    found: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name) or UNKNOWN
        except PackageNotFoundError:
            continue
    for module, names in (
        ("torch", ("torch",)),
        ("fbgemm_gpu", FBGEMM_BUILDS + FBGEMM_GENAI_BUILDS),
        ("torchrec", TORCHREC_BUILDS),
    ):
        there = any(name in found for name in names)
        if not there and (module in sys.modules or find_spec(module) is not None):
            found[names[0]] = UNKNOWN
    return found


def mix_to_install(version: str) -> Mix:
    """The mix to install on a torch: its own; the newest that was run for a torch that no fbgemm serves yet."""
    unknown = _unknown_torch(version)
    return unknown[1] if unknown is not None else mix_for_torch(version) or TESTED_MIX


def mix_for_torch(version: str) -> Mix | None:
    """The mix of a torch version, by its major and minor numbers; None when the table has none."""
    release = parse_release(version)
    return next((mix for mix in MIXES if release is not None and mix.torch == release[:2]), None)


def mix_that_was_run(installed: Mapping[str, str]) -> Mix | None:
    """The mix whose tests were run with exactly these three releases; local labels (+cpu) do not count."""
    found = [parse_release(installed[name]) for name in _names(installed) if name is not None]
    return next((mix for mix in MIXES if mix.run is not None and found == [*map(parse_release, mix.run)]), None)


def install_command(
    mix: Mix = TESTED_MIX, cpu: bool = True, packages: tuple[str, ...] = ("torch", "fbgemm", "torchrec")
) -> str:
    """The pip command that installs ``packages`` of a mix, in the order in which they must go in."""
    steps = []
    if "torch" in packages:
        index = " --index-url https://download.pytorch.org/whl/cpu" if cpu and sys.platform == "linux" else ""
        steps.append(f"pip install {mix.pin('torch', 'torch')}{index}")
    if "fbgemm" in packages:
        steps.append(f"pip install {mix.pin('fbgemm', 'fbgemm-gpu-cpu' if cpu else 'fbgemm-gpu')}")
    if "torchrec" in packages:
        # torchrec requires the CUDA build by name, so the CPU build needs --no-deps and the rest by hand.
        steps.append(f"pip install {'--no-deps ' if cpu else ''}{mix.pin('torchrec', 'torchrec')}")
        steps += [f"pip install {TORCHREC_NEEDS}"] if cpu else []
    return " && ".join(steps)


def is_cpu_build(installed: Mapping[str, str]) -> bool:
    """Whether torch, or else fbgemm, is a build without CUDA; if neither tells, whether there is no NVIDIA driver."""
    torch = installed.get("torch", "")
    if "+" in torch:
        return torch.split("+")[1].startswith("cpu")
    if (fbgemm := _names(installed)[1]) is not None:
        return fbgemm.endswith("-cpu")
    return not Path("/proc/driver/nvidia/version").exists()


def _names(installed: Mapping[str, str]) -> tuple[str | None, str | None, str | None]:
    """The distributions that provide torch, fbgemm and torchrec."""

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in installed), None)

    return first(("torch",)), first(FBGEMM_BUILDS), first(TORCHREC_BUILDS)


def _list(items: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join(", ".join(items).rsplit(", ", 1))


def _unknown_torch(version: str) -> tuple[str, Mix] | None:
    """Why a torch has no row in the table, and the mix to use instead; None when it has one or cannot be read."""
    release = parse_release(version)
    if release is None or mix_for_torch(version) is not None:
        return None
    if release[:2] > MIXES[-1].torch:
        return f"there is no fbgemm for torch {_dotted(release[:2])} yet, as far as this version knows", NEWEST_MIX
    return f"torch {_dotted(release[:2])} is older than {_dotted(MIXES[0].torch)}, the oldest that fits", TESTED_MIX


def _missing(installed: Mapping[str, str]) -> VersionProblem | None:
    """One problem for whatever is not there at all."""
    absent = [name for name, there in zip(("torch", "fbgemm", "torchrec"), _names(installed), strict=True) if not there]
    if not absent:
        return None
    cpu = is_cpu_build(installed)
    titles = {"torch": "torch", "fbgemm": "fbgemm-gpu-cpu" if cpu else "fbgemm-gpu", "torchrec": "torchrec"}
    message = f"{_list([titles[name] for name in absent])} {'is' if len(absent) == 1 else 'are'} not installed"
    first = ""
    genai = [name for name in FBGEMM_GENAI_BUILDS if name in installed]
    if "fbgemm" in absent and genai:
        message += " (the genai build of fbgemm has no embedding operators)"
        first = f"pip uninstall -y {' '.join(genai)} && "
    if (unknown := _unknown_torch(installed.get("torch", ""))) is not None:
        why, mix = unknown
        return VersionProblem(f"{message}, and {why}", f"use {mix}: {install_command(mix, cpu)}", missing=True)
    mix = mix_for_torch(installed.get("torch", "")) or TESTED_MIX
    return VersionProblem(message, f"run {first}{install_command(mix, cpu, tuple(absent))}", missing=True)


def _misfit(installed: Mapping[str, str]) -> VersionProblem | None:
    """One problem for releases that are all there and do not belong together."""
    torch, fbgemm, torchrec = _names(installed)
    if torch is None or fbgemm is None or torchrec is None:
        return None
    cpu = is_cpu_build(installed)
    if (unknown := _unknown_torch(installed[torch])) is not None:
        why, mix = unknown
        return VersionProblem(why, f"use {mix}: {install_command(mix, cpu)}")
    known = mix_for_torch(installed[torch])
    if known is None:
        return None
    found = {"fbgemm": parse_release(installed[fbgemm]), "torchrec": parse_release(installed[torchrec])}
    wanted = {"fbgemm": known.fbgemm, "torchrec": known.torchrec}
    wrong = [name for name, release in found.items() if release is not None and release[:2] != wanted[name]]
    if not wrong:
        return None
    return VersionProblem(
        f"{_list([f'{name} {installed[name]}' for name in (torch, fbgemm, torchrec)])} do not fit together",
        f"torch {_dotted(known.torch)} goes with fbgemm {_dotted(known.fbgemm)} and "
        f"torchrec {_dotted(known.torchrec)}; run {install_command(known, cpu, tuple(wrong))}",
    )


def version_problems(
    installed: Mapping[str, str] | None = None, python: tuple[int, int] | None = None
) -> list[VersionProblem]:
    """What is wrong with the installed releases.

    Args:
        installed (Optional[Mapping[str, str]]): versions by distribution name; what is installed by default.
        python (Optional[tuple[int, int]]): the running Python by default.
    """
    given = installed_versions() if installed is None else installed
    installed = {canonicalize_name(name): version for name, version in given.items()}
    python = python or (sys.version_info[0], sys.version_info[1])
    problems = []
    if not OLDEST_PYTHON <= python <= NEWEST_PYTHON:
        problems.append(
            VersionProblem(
                f"Python {_dotted(python)} is not one of {_dotted(OLDEST_PYTHON)} to {_dotted(NEWEST_PYTHON)}",
                f"make a virtual environment with Python {_dotted(NEWEST_PYTHON)}",
            )
        )
    builds = [name for name in FBGEMM_BUILDS + FBGEMM_GENAI_BUILDS if name in installed]
    if len(builds) > 1:
        # Where torch has to change as well, its remedy installs fbgemm.
        unknown = _unknown_torch(installed.get("torch", ""))
        mix = mix_for_torch(installed.get("torch", "")) or TESTED_MIX
        again = "" if unknown else f" && {install_command(mix, is_cpu_build(installed), ('fbgemm',))}"
        first = ", before anything else" if unknown else ""
        problems.append(
            VersionProblem(
                f"{' and '.join(builds)} are both installed and overwrite each other's files",
                f"run pip uninstall -y {' '.join(builds)}{again}{first}",
            )
        )
    elif "fbgemm-gpu" in installed and "+cpu" in installed.get("torch", ""):
        unknown = _unknown_torch(installed["torch"])
        mix = mix_for_torch(installed["torch"]) or TESTED_MIX
        again = "" if unknown else f" && {install_command(mix, True, ('fbgemm',))}"
        problems.append(
            VersionProblem(
                f"torch {installed['torch']} is a CPU build, fbgemm-gpu is a CUDA build",
                f"run pip uninstall -y fbgemm-gpu{again}",
            )
        )
    if (missing := _missing(installed)) is not None:
        problems.append(missing)
    if (misfit := _misfit(installed)) is not None:
        problems.append(misfit)
    return problems


def check_versions(installed: Mapping[str, str] | None = None) -> list[str]:
    """What is wrong with the installed releases and what to do, a sentence each; empty when all is well.

    Args:
        installed (Optional[Mapping[str, str]]): versions by distribution name; what is installed by default.

    Example::

        check_versions({"torch": "2.13.0", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"})   # []
    """
    return [str(problem) for problem in version_problems(installed)]


def warn_or_raise_at_import(installed: Mapping[str, str] | None = None) -> None:
    """Refuse to go on without torch, fbgemm or torchrec; warn of a mix that does not fit, which may yet work.

    Raises:
        ImportError: if one of the three is not installed.
    """
    for problem in version_problems(installed):
        if problem.missing:
            raise ImportError(f"torchrec_mpe: {problem}")
        warnings.warn(f"torchrec_mpe: {problem}", RuntimeWarning, stacklevel=3)
