"""Which torch a build of the operators is for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchrec_mpe.ops import library

LIBRARY = library.LIBRARY


def test_a_build_says_its_torch() -> None:
    assert library.torch_built_for(LIBRARY) == torch.__version__.split("+")[0]


@pytest.mark.parametrize("other", ["2.99.0", "1.2.3"])
def test_a_build_for_another_torch_is_not_loaded(other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built_for = str(library.torch_built_for(LIBRARY))
    assert built_for in torch.__version__
    content = LIBRARY.read_bytes().replace(f"torch {built_for}\0".encode(), f"torch {other}\0".encode())
    (tmp_path / LIBRARY.name).write_bytes(content)
    monkeypatch.setattr(library, "LIBRARY", tmp_path / LIBRARY.name)
    problem = library._load()
    assert problem == f"{LIBRARY.name} was built for torch {other}, and this is torch {torch.__version__}"


def test_another_patch_release_is_the_same_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.torch, "__version__", ".".join([*torch.__version__.split(".")[:2], "99+cu130"]))
    assert library._load() is None


def test_it_is_said_once_at_import(tmp_path: Path) -> None:
    """In a copy of the package whose library is for another torch."""
    root = Path(library.__file__).parents[2]
    shutil.copytree(root / "torchrec_mpe", tmp_path / "torchrec_mpe")
    copied = tmp_path / LIBRARY.relative_to(root)
    copied.write_bytes(LIBRARY.read_bytes().replace(b"was built for torch 2.", b"was built for torch 1."))
    run = subprocess.run(
        [sys.executable, "-c", "import torchrec_mpe.ops.library"], cwd=tmp_path, capture_output=True, text=True,
        timeout=120, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True,
    )  # fmt: skip
    assert run.stderr.count("was built for torch 1.") == 1 and "undefined symbol" not in run.stderr
