"""Links of README and docs lead to files and headings; the site's hook turns them into links of the site."""

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

_ROOT = Path(__file__).parents[2]
_PAGES = [
    _ROOT / "README.md",
    _ROOT / "CONTRIBUTING.md",
    _ROOT / "CHANGELOG.md",
    *sorted((_ROOT / "docs").glob("*.md")),
]
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s#:]*)(#[^)\s]*)?\)")


def _anchors(page: Path) -> set[str]:
    """As GitHub and Python-Markdown make them of headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(_CODE.sub("", page.read_text())):
        file = (page.parent / target).resolve() if target else page
        assert file.exists() and file.is_relative_to(_ROOT), f"{page.name} links {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name} links {target}{anchor}"


def test_links_in_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("docs_site", _ROOT / "tools" / "docs_site.py")
    assert spec is not None and spec.loader is not None
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    monkeypatch.setattr(site, "_published", lambda path, config, files: f"source/{path}")

    def rewritten(text: str, page: str) -> str:
        return str(site.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=page)), None, None))

    assert (
        rewritten("[a](docs/cache.md#on-call) [b](LICENSE)", "index.md") == "[a](cache.md#on-call) [b](source/LICENSE)"
    )
    assert rewritten("[c](../README.md#limits) [d](cache.md)", "serving.md") == "[c](index.md#limits) [d](cache.md)"
    assert rewritten("[`e`](../Makefile) [e](../benchmarks/results)", "x.md") == "[`e`](source/Makefile) e"
    untouched = "[f](#here) [g](https://h.org/i) `[j](k.md)` [l](../no-such-file)\n```\n[m](../README.md)\n```\n"
    assert rewritten(untouched, "x.md") == untouched
