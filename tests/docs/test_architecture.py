"""docs/architecture.md names rooms and files that there are."""

import re
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_PAGE = (_ROOT / "docs" / "architecture.md").read_text()


def _rooms() -> list[str]:
    layers = re.search(
        r'^layers = \[\n(    "app",\n.*?)\]', (_ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    assert layers is not None
    return re.findall(r'"(\w+)"', layers[1])


def test_every_room_from_the_top_down() -> None:
    section = _PAGE.partition("## The rooms")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == _rooms()


def test_the_picture_shows_rooms() -> None:
    picture = (_ROOT / "docs" / "architecture.svg").read_text()
    named = {name for names in re.findall(r'class="room"[^>]*>([^<]+)<', picture) for name in names.split(", ")}
    assert named and all((_ROOT / "torchrec_mpe" / name).is_dir() for name in named)
    assert {name.partition("/")[0] for name in named} >= {
        "app",
        "precision",
        "modules",
        "distributed",
        "inference",
        "ops",
    }


def test_named_files_exist() -> None:
    named = re.findall(r"`([\w/]+(?:\.\w+)*\.(?:py|pyi|cpp|h|json))`", _PAGE)
    assert len(named) > 20
    for name in named:
        assert (_ROOT / name).is_file() or (_ROOT / "torchrec_mpe" / name).is_file(), f"there is no {name}"
