"""The examples of docs/format.md print what the page shows."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from torchrec_mpe.packing.packed_tables import PackedTables

PAGE = Path(__file__).parents[2] / "docs" / "format.md"
_EXAMPLE = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def examples() -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """What each example shows and printed, and the names that they left."""
    names: dict[str, Any] = {}
    printed: list[tuple[str, str]] = []
    for code, shown in _EXAMPLE.findall(PAGE.read_text()):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, names)
        printed.append((shown, output.getvalue()))
    return printed, names


def test_examples_print_what_is_shown(examples: tuple[list[tuple[str, str]], dict[str, Any]]) -> None:
    assert len(examples[0]) == PAGE.read_text().count("```python") == 7
    for shown, printed in examples[0]:
        assert printed == shown


def test_the_tensors_are_listed(examples: tuple[list[tuple[str, str]], dict[str, Any]]) -> None:
    packed = examples[1]["packed"]
    assert isinstance(packed, PackedTables)
    section = PAGE.read_text().partition("## A collection")[2].partition("```python")[0]
    listed = re.findall(r"^\| `(\w+)` \| (\w+)", section, re.MULTILINE)
    assert listed == [(name, str(x.dtype).removeprefix("torch.")) for name, x in packed.tensors().items()]


def test_every_entry_of_a_manifest_is_in_the_example(examples: tuple[list[tuple[str, str]], dict[str, Any]]) -> None:
    schema = json.loads((PAGE.parents[1] / "torchrec_mpe/inference/artifact/artifact.schema.json").read_text())
    shown = json.loads(examples[0][-1][0])
    assert shown.keys() == schema["properties"].keys()
    assert shown["version"] == schema["properties"]["version"]["const"]
    assert shown["collections"][0].keys() == schema["$defs"]["collection"]["properties"].keys()
    assert shown["collections"][0]["tables"][0].keys() == schema["$defs"]["table"]["properties"].keys()
    assert shown["files"]["tables-0-0.safetensors"].keys() == schema["$defs"]["file"]["properties"].keys()
