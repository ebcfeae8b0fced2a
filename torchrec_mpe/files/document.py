"""The header of our own files: which kind of document it is, and of which version."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DocumentFormat:
    """A kind of document, told apart by the entries "format" and "version" of a JSON file or a safetensors file.

    Attributes:
        name (str): "torchrec_mpe.<kind>".
        version (int): that this release writes and reads.
        called (str): by people, "a precision plan".
        remedy (str): for a document of another version, "emit the model again".
    """

    name: str
    version: int
    called: str
    remedy: str = ""

    def header(self) -> dict[str, Any]:
        """The entries of a JSON document."""
        return {"format": self.name, "version": self.version}

    def text_header(self) -> dict[str, str]:
        """The entries of a safetensors file's metadata, all of which is text."""
        return {"format": self.name, "version": str(self.version)}

    def check(self, path: Path, document: object, *, text: bool = False) -> None:
        """Make sure that a document, or a safetensors file's metadata (``text``), is of this kind and version.

        Raises:
            ValueError: in one sentence, if it is not.
        """
        if not isinstance(document, Mapping) or document.get("format") != self.name:
            raise ValueError(f"{path} is not {self.called}")
        version, wanted = document.get("version"), str(self.version) if text else self.version
        if version != wanted:
            remedy = self.remedy and f": {self.remedy}"
            raise ValueError(
                f"{path} is {self.called} of version {version!s:.20}, this release reads version {wanted}{remedy}"
            )

    def read(self, path: Path) -> dict[str, Any]:
        """The entries of a JSON document but for the header.

        Raises:
            ValueError: in one sentence, if the file is no JSON, of another kind or of another version.
            OSError: if it cannot be read.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        # RecursionError: lists in lists without end.
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not {self.called}: {error}") from error
        self.check(path, document)
        return {key: value for key, value in document.items() if key not in self.header()}


def document_sha256(document: Mapping[str, Any], *, allow_nan: bool = False) -> str:
    """The SHA-256 of all entries but "sha256", hexadecimal: of JSON in UTF-8 with sorted keys and no spaces.

    Raises:
        ValueError: for what is no JSON, such as numbers that are not finite, unless ``allow_nan``.
    """
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=allow_nan)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
