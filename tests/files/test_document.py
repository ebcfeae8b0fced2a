"""The header of our files."""

import json
from pathlib import Path

import pytest

from torchrec_mpe.files.document import DocumentFormat

FORMAT = DocumentFormat("torchrec_mpe.test", 3, "a test's document", "test again")


def test_what_is_written_is_read_without_its_header(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({**FORMAT.header(), "x": [1, None]}))
    assert FORMAT.read(tmp_path / "d.json") == {"x": [1, None]}
    FORMAT.check(tmp_path, FORMAT.text_header(), text=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "d.json is not a test's document: "),
        (b"\xff", "d.json is not a test's document: "),
        (b"[]", "d.json is not a test's document$"),
        (b'{"format": "torchrec_mpe.other", "version": 3}', "d.json is not a test's document$"),
        (
            b'{"format": "torchrec_mpe.test", "version": 4}',
            "a test's document of version 4, this release reads version 3: test again$",
        ),
        (b'{"format": "torchrec_mpe.test", "version": "3"}', "of version 3, this release reads version 3"),
        (b'{"format": "torchrec_mpe.test"}', "of version None, this release reads version 3"),
    ],
)
def test_other_documents_are_refused_in_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        FORMAT.read(tmp_path / "d.json")


def test_metadata_of_another_version_or_none_is_refused(tmp_path: Path) -> None:
    for metadata in (None, {}, {**FORMAT.text_header(), "version": "2"}):
        with pytest.raises(ValueError, match="a test's document"):
            FORMAT.check(tmp_path, metadata, text=True)
