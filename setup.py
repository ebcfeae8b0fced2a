"""Builds the C++ operators; everything else is in pyproject.toml."""

import os
import platform
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

SOURCES = Path("kernels/cpu")


def torch_extension() -> dict[str, object]:
    """The arguments of setup() that build the operators against the torch of the environment installed into.

    An isolated build has no torch of its own, and must not get another one than the operators will run with.
    """
    builds = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}
    if os.environ.get("TORCHREC_MPE_NO_KERNELS") == "1" or not builds & set(sys.argv):
        return {}
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.path.append(sysconfig.get_path("platlib"))
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        sys.exit(
            f"error: the C++ operators are built against the installed torch, and there is none ({error}): install "
            "torch, fbgemm and torchrec first (docs/install.md), then this package with `pip install "
            "--no-build-isolation .`, which builds with that torch"
        )
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"error: no C++ compiler ({compiler}) to build the operators: install one (g++ or clang++), name it in "
            "CXX, or set TORCHREC_MPE_NO_KERNELS=1 to install the slow reference operators only"
        )
    # at::parallel_for needs the pragmas compiled; the runtime is the one torch brings. Linking another one costs
    # milliseconds at every parallel region, of torch's own operators too: hence no -fopenmp when linking.
    openmp = ["-fopenmp"] if platform.system() == "Linux" else []
    extension = CppExtension(
        "torchrec_mpe.ops.libtorchrec_mpe",
        [str(path) for path in sorted(SOURCES.glob("*.cpp"))],
        extra_compile_args=["-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", *openmp],
        extra_link_args=["-s"] if platform.system() == "Linux" else [],
        py_limited_api=True,  # without libtorch_python: the library is for C++ processes too
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    }


def long_description() -> dict[str, str]:
    """README for a package index: links to files of the repository would lead nowhere there, and become their text."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"\[([^\]]*)\]\((?!https?://|#)[^)]*\)", r"\1", text)
    return {"long_description": text, "long_description_content_type": "text/markdown"}


setup(**torch_extension(), **long_description())
