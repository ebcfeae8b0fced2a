"""What mkdocs does besides: README is a page, files that pages link are in the site, public names have docstrings.

A hook of mkdocs.yml. Pages link to each other and to the repository's files as they do on GitHub.
"""

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import api_page  # noqa: E402

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files outside docs/ that are pages, and what they are called in the site."""

_LINK = re.compile(
    r"^```.*?^```$"  # no link: a block of code
    r"|(?P<text>!?\[(?:[^\]\[]|\[[^\]]*\])*\])\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)"
    r"|`[^`\n]+`",  # no link: code in a line
    re.DOTALL | re.MULTILINE,
)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of PAGES."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of the repository become links of the site; the API page gets its docstrings."""
    sources = {target: source for source, target in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if source == "docs/api.md":
        return reference()
    return _LINK.sub(lambda found: _link(found, source, config, files), markdown)


def reference() -> str:
    """The API page with whole docstrings."""
    parts = [api_page.page().partition("## ")[0]]
    for title, (what, names) in api_page.groups().items():
        parts.append(f"## {title}\n\n{what[0].upper()}{what[1:]}.\n")
        parts += [f"::: torchrec_mpe.{name.module}.{name.name}\n" for name in names]
    return "\n".join(parts)


def _link(found: "re.Match[str]", source: str, config: Any, files: Any) -> str:
    text, target, anchor = found["text"], found["target"], found["anchor"] or ""
    if target is None:
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    file = ROOT / path
    if path in PAGES or path.startswith("docs/"):
        return f"{text}({PAGES.get(path, path.removeprefix('docs/'))}{anchor})"
    if not file.is_relative_to(ROOT) or not file.exists():
        return found[0]  # mkdocs reports it
    if file.is_dir():
        return text[1:-1]
    return f"{text}({_published(path, config, files)})"


def _published(path: str, config: Any, files: Any) -> str:
    """A file of the repository in the site, as text that browsers show."""
    from mkdocs.structure.files import File

    name = f"source/{path}" + ("" if path.endswith(".json") else ".txt")
    if files.get_file_from_path(name) is None:
        files.append(File.generated(config, name, abs_src_path=os.fspath(ROOT / path)))
    return name
