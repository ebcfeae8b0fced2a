"""docs/results.md, and the parts of other pages that state figures, from the records in benchmarks/results.

    python tools/results.py            # writes the pages
    python tools/results.py --check    # writes nothing; ends with 1 and says which pages are not what it would write

The texts are tools/result_pages/NAME.md. ``{{ lookup: means }}`` there is the figure or table "means" of
benchmarks/results/lookup.json, made by tools/result_pages/lookup.py. results.md is a page; of another page the text
stands between the lines ``<!-- results: NAME -->`` and ``<!-- results: end -->``.

A record of a further machine is benchmarks/results/lookup.MACHINE.json: each table of it follows that of lookup.json.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

from result_pages import (  # noqa: E402
    accuracy,
    communication,
    compress,
    lookup,
    prepare_data,
    scaling,
    search_op,
    serve,
    train_step,
)
from result_pages import cache as cached_training  # noqa: E402
from result_pages.text import Figures  # noqa: E402

RECORDS = ROOT / "benchmarks" / "results"
TEXTS = ROOT / "tools" / "result_pages"
FIGURES: Mapping[str, Callable[[Any], Figures]] = {
    "accuracy_ciao": accuracy.figures,
    "accuracy_generated": accuracy.figures,
    "cache": cached_training.figures,
    "communication": communication.figures,
    "compress_ciao": compress.figures,
    "compress_ciao_64": compress.figures,
    "compress_ciao_128": compress.figures,
    "compress_ciao_dlrm": compress.figures,
    "compress_generated": compress.figures,
    "compress_journey": compress.figures,
    "lookup": lookup.figures,
    "prepare_data": prepare_data.figures,
    "scaling": scaling.figures,
    "search_op": search_op.figures,
    "serve": serve.figures,
    "train_step": train_step.figures,
}
PAGES = ("docs/results.md", "README.md", "docs/cache.md", "docs/scaling.md", "docs/serving.md")
_FIGURE = re.compile(r"\{\{ (\w+): (.*?) \}\}")
_BLOCK = re.compile(r"(<!-- results: (?!end)(\w+) -->\n).*?(<!-- results: end -->)", re.DOTALL)
_PROSE = re.compile(r"[A-Za-z`\"]|- ")
_CODE = re.compile(r"`[^`]*`")
_GENERATED = "<!-- Written by tools/results.py from benchmarks/results and tools/result_pages/results.md. -->\n"


@cache
def figures(name: str) -> list[Figures]:
    """Of a benchmark's record, and then of those of further machines.

    Raises:
        FileNotFoundError: if it has no record.
    """
    files = [RECORDS / f"{name}.json", *sorted(RECORDS.glob(f"{name}.*.json"))]
    return [FIGURES[name](json.loads(file.read_text())) for file in files]


def fill(text: str) -> str:
    """A text with its figures.

    Raises:
        KeyError: if there is no such figure.
    """

    def value(found: re.Match[str]) -> str:
        name, figure = found.groups()
        first, *others = figures(name)
        shown = first[figure]
        if shown.startswith("|"):
            shown = "\n".join([shown, *(f"\nOn {its['machine']}:\n\n{its[figure]}" for its in others)])
        return shown

    paragraphs = (_FIGURE.sub(value, paragraph) for paragraph in text.split("\n\n"))
    return "\n\n".join(_wrap(paragraph) if _PROSE.match(paragraph) else paragraph for paragraph in paragraphs)


def _wrap(paragraph: str) -> str:
    """Lines of 120 characters, items of a list with an indent; what stands in backquotes stays on one."""
    kept = _CODE.sub(lambda code: code[0].replace("\n", " ").replace(" ", "\0"), paragraph)
    lines = [
        textwrap.fill(
            " ".join(item.split()), 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        for item in kept.rstrip("\n").replace("\n- ", "\n\n- ").split("\n\n")
        for indent in ("  " if item.startswith("- ") else "",)
    ]
    return "\n".join(lines).replace("\0", " ") + "\n" * paragraph.endswith("\n")


def rendered(page: str, current: str) -> str:
    """What a page should say.

    Raises:
        ValueError: if the page has nothing to write.
    """
    if page == "docs/results.md":
        return _GENERATED + "\n" + fill((TEXTS / "results.md").read_text())
    text, blocks = _BLOCK.subn(
        lambda found: f"{found[1]}\n{fill((TEXTS / f'{found[2]}.md').read_text()).strip()}\n\n{found[3]}", current
    )
    if not blocks:
        raise ValueError(f"{page} has no line <!-- results: NAME -->")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, end with 1 if a page is out of date")
    options = parser.parse_args(arguments)
    outdated = []
    for page in PAGES:
        file = ROOT / page
        current = file.read_text() if file.exists() else ""
        wanted = rendered(page, current)
        if wanted != current:
            outdated.append(page)
            if not options.check:
                file.write_text(wanted)
    if options.check and outdated:
        sys.exit(f"{', '.join(outdated)}: not what the records say, run python tools/results.py")


if __name__ == "__main__":
    main()
