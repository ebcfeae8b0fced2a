"""The check of upstream names: of this package, and of small ones that must fail and pass."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_upstream_names", _ROOT / "tools" / "check_upstream_names.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_upstream_names"] = module
    spec.loader.exec_module(module)
    return module


def test_this_package_touches_upstream_names_in_upstream_alone(tool: ModuleType) -> None:
    assert tool.findings(_ROOT / "torchrec_mpe") == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import torch._dynamo", "imports torch._dynamo"),
        ("from torch.utils._pytree import tree_map", "imports tree_map from torch.utils._pytree"),
        ("from torch.nn.modules.batchnorm import _BatchNorm", "imports _BatchNorm"),
        ("from torch import _C", "imports _C from torch"),
        ("from torchrec.distributed.planner.constants import MIN_CW_DIM", "imports MIN_CW_DIM"),
        ("from torch.distributed.checkpoint import save", "imports save"),
        ("import torchx.util.io", "imports torchx.util.io"),
        ("import torch\ntorch._assert_async(1, 'x')", "reads torch._assert_async"),
        ("import polars as pl\npl.Categories.random()", "reads pl.Categories"),
        ("def f(tbe): tbe.iter_cpu.fill_(0)", "reads tbe.iter_cpu"),
        ("def f(tbe): tbe._buffers = {}", "reads tbe._buffers"),
        ("def f(tbe): setattr(tbe, '_buffers', {})", "reads tbe._buffers"),
        ("def f(x): return getattr(x, '_percentage', 0)", "reads x._percentage"),
        (
            "from torch import nn\nclass A(nn.Module):\n def f(self): return self._buffers",
            "uses _buffers of an upstream",
        ),
        ("from torch import nn\nclass A(nn.Module):\n def __init__(self): self._buffers = {}", "uses _buffers"),
        ("from torch import nn\nclass A(nn.Module):\n def _apply(self, f): return self", "A overrides _apply"),
        ("from torch import nn\nclass A(nn.Module):\n def f(self): super()._apply(f)", "uses _apply of an upstream"),
        ("from p.base import Base\nclass A(Base):\n def f(self): return self._modules", "uses _modules of an upstream"),
        ("from torch import nn\nclass A(nn.Module):\n def f(self): return self._unknown", "which no class of ours"),
        ("from p.upstream.base import Base\nclass A(Base):\n def f(self): return self._buffers", "uses _buffers"),
    ],
)
def test_what_is_found(tool: ModuleType, tmp_path: Path, source: str, said: str) -> None:
    found = tool.findings(_package(tmp_path, source))
    assert len(found) == 1 and said in found[0], found
    assert f"{tmp_path / 'p' / 'm.py'}:{source.count(chr(10)) + 1}: " in found[0]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nfrom torch.distributed.checkpoint.stateful import Stateful",
        "import os\nos._exit(1)",
        "def f(t): return t._replace(x=1), t._fields",
        "_x = 1\nclass A:\n _y: int = 2\n def __init__(self): self._z = 3\ndef f(a): return a._x, a._y, a._z",
        "from torch import nn\nclass A(nn.Module):\n def __init__(self): self._own = 1\n def f(self): return self._own",
        "from p.base import Base\nclass A(Base):\n def f(self): return self._of_base",
        "from p.upstream.base import Base\nclass A(Base):\n def f(self): return self._modules, self._of_upstream()",
    ],
)
def test_what_is_ours_or_public_passes(tool: ModuleType, tmp_path: Path, source: str) -> None:
    assert tool.findings(_package(tmp_path, source)) == []


def _package(folder: Path, source: str) -> Path:
    """A package ``p`` with a module ``m`` of this source, one with a base class, and one in its ``upstream``."""
    package = folder / "p"
    (package / "upstream").mkdir(parents=True)
    for path in (package / "__init__.py", package / "upstream" / "__init__.py"):
        path.write_text("")
    (package / "m.py").write_text(source)
    (package / "base.py").write_text(
        "from torch import nn\nclass Base(nn.Module):\n def __init__(self): self._of_base = 1\n"
    )
    (package / "upstream" / "base.py").write_text(
        "from torch import nn\nclass Base(nn.Module):\n lent_to_subclasses = ('_modules',)\n"
        " def _of_upstream(self): return self._buffers\n"
    )
    return package
