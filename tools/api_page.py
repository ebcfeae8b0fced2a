"""docs/api.md: the public names by group, each with the first paragraph of its docstring.

    python tools/api_page.py            # writes the page
    python tools/api_page.py --check    # writes nothing; ends with 1 if it is out of date

Names and groups are those of torchrec_mpe/__init__.pyi. Nothing is imported. In the site the whole docstrings follow:
tools/docs_site.py.
"""

import argparse
import ast
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
_STUB = ROOT / "torchrec_mpe" / "__init__.pyi"
_GROUP = re.compile(r"# (\w+): (.*)\.")
_IMPORT = re.compile(r"from \.([\w.]+) import (\w+) as \2")
_ROLE = re.compile(r":\w+:`[~.]?([^`]*)`")
_EMPTY_BLOCK = re.compile(r"^ *::$\n", re.MULTILINE)
_BLOCK = re.compile(r"::$", re.MULTILINE)

_HEAD = """<!-- Written by tools/api_page.py from torchrec_mpe/__init__.pyi and docstrings. -->

# API

`import torchrec_mpe as mpe`: these names are public, all else may change without notice. Methods and attributes that
are told in a docstring belong to it.
"""


@dataclass(frozen=True)
class PublicName:
    """A name of ``torchrec_mpe``, and the module under it that defines it."""

    name: str
    module: str

    @property
    def file(self) -> str:
        """Path of the module's source in the repository."""
        return f"torchrec_mpe/{self.module.replace('.', '/')}.py"

    def summary(self) -> str:
        """The first paragraph of its docstring, in Markdown.

        Raises:
            ValueError: if it has none.
        """
        tree = ast.parse((ROOT / self.file).read_text())
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == self.name:
                first = (ast.get_docstring(node) or "").split("\n\n")[0]
                if first:
                    return markdown(" ".join(first.split()))
        raise ValueError(f"{self.file} defines no {self.name} with a docstring")


def markdown(docstring: str) -> str:
    """The few marks of reStructuredText that docstrings have, as Markdown: roles, and ``::`` before a block."""
    return _BLOCK.sub(":", _EMPTY_BLOCK.sub("", _ROLE.sub(r"`\1`", docstring)))


def groups() -> Mapping[str, tuple[str, list[PublicName]]]:
    """What each group is for and its names, by its title. ``__version__`` is in none.

    Raises:
        ValueError: if a name stands in no group.
    """
    found: dict[str, tuple[str, list[PublicName]]] = {}
    names: list[PublicName] | None = None
    for line in _STUB.read_text().splitlines():
        if group := _GROUP.fullmatch(line):
            names = []
            found[group[1]] = group[2], names
        elif line.startswith("# isort"):
            names = None
        elif (imported := _IMPORT.fullmatch(line)) and imported[2] != "__version__":
            if names is None:
                raise ValueError(f"{_STUB}: {imported[2]} stands in no group")
            names.append(PublicName(imported[2], imported[1]))
    return found


def page() -> str:
    """The text of docs/api.md."""
    parts = [_HEAD]
    for title, (what, names) in groups().items():
        lines = [f"| [`{name.name}`](../{name.file}) | {name.summary()} |" for name in names]
        parts.append(f"## {title}\n\n{what[0].upper()}{what[1:]}.\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n")
    return "\n".join([*parts, "`__version__` is the version of the package.\n"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, end with 1 if the page is out of date")
    options = parser.parse_args(arguments)
    wanted = page()
    if not options.check:
        PAGE.write_text(wanted)
    elif PAGE.read_text() != wanted:
        sys.exit("docs/api.md is out of date: run python tools/api_page.py")


if __name__ == "__main__":
    main()
