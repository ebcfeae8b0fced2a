"""docs/api.md, and its reference in the site, have every public name and no other."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import torchrec_mpe

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """tools/docs_site.py, which has tools/api_page.py as ``api_page``."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("docs_site", _ROOT / "tools" / "docs_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def test_every_public_name_and_no_other(tools: ModuleType) -> None:
    public = sorted(set(torchrec_mpe.__all__) - {"__version__"})
    page = (_ROOT / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", page, re.MULTILINE)) == public
    directives = re.findall(r"^::: torchrec_mpe\.(\S+)\.(\w+)$", tools.reference(), re.MULTILINE)
    assert sorted(name for _, name in directives) == public
    for module, name in directives:
        assert getattr(torchrec_mpe, name).__module__ == f"torchrec_mpe.{module}"
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == ["Train", "Plan", "Compress", "Serve"]


def test_the_page_is_what_docstrings_say(tools: ModuleType) -> None:
    assert (_ROOT / "docs" / "api.md").read_text() == tools.api_page.page(), "run python tools/api_page.py"


def test_docstrings_become_markdown(tools: ModuleType) -> None:
    docstring = "See :func:`~a.b` and ``x``::\n\n    code\n\n::\n\n    more :class:`.C`\n"
    assert tools.api_page.markdown(docstring) == "See `a.b` and ``x``:\n\n    code\n\n\n    more `C`\n"


def test_a_name_without_a_docstring_is_refused(tools: ModuleType) -> None:
    with pytest.raises(ValueError, match="defines no Missing"):
        tools.api_page.PublicName("Missing", "cache.config").summary()


def test_pages_and_examples_name_public_names_only() -> None:
    examples = (_ROOT / "examples").rglob("*.py")
    for file in (_ROOT / "README.md", *(_ROOT / "docs").glob("*.md"), *examples):
        named = set(re.findall(r"\bmpe\.(\w+)", file.read_text()))
        assert named <= set(torchrec_mpe.__all__), f"{file.name} names what is not public"
