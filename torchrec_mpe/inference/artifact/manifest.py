"""The manifest of an artifact: written, and read only if it is complete, consistent and of this version."""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema

from torchrec_mpe.files.document import DocumentFormat, document_sha256

MANIFEST = "manifest.json"
_FORMAT = DocumentFormat("torchrec_mpe.artifact", 5, "an artifact's manifest", "emit the model again")
SCHEMA_ID = f"urn:torchrec_mpe:artifact:{_FORMAT.version}"
# A thousand tables take 1 MiB. A larger file is no manifest, and parsing it would take many times its size.
_MAX_BYTES = 1 << 26

Document = dict[str, Any]


def write_manifest(folder: Path, document: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: format, version and digest are added, and what cannot be read back is refused.

    Raises:
        ValueError: if the document does not follow the schema, or holds what is no JSON.
    """
    whole: Document = {"$schema": SCHEMA_ID, **_FORMAT.header(), "sha256": "", **document}
    whole = json.loads(json.dumps(whole, allow_nan=False))
    whole["sha256"] = document_sha256(whole)
    (folder / MANIFEST).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    read_manifest(folder)


def read_manifest(folder: Path) -> Document:
    """Read ``manifest.json``, after checking it against its schema, its digest and itself.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: one sentence, if it is damaged, of another version, or contradicts itself.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no artifact: it holds no {MANIFEST}")
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{file} is not {_FORMAT.called}: it has more than {_MAX_BYTES} bytes")
    try:
        document: Document = json.loads(
            file.read_bytes().decode("utf-8"), object_pairs_hook=_without_repetition, parse_constant=_no_constant
        )
        digest = document_sha256(document) if isinstance(document, dict) else ""
    # UnicodeError: also a character that is half of a pair. RecursionError: lists in lists without end.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {str(error) or type(error).__name__}") from error
    _FORMAT.check(file, document)
    mistake = jsonschema.exceptions.best_match(_validator().iter_errors(document))
    if mistake is not None:
        raise ValueError(f"{file} does not follow its schema at {mistake.json_path:.200}: {mistake.message:.200}")
    if document["sha256"] != digest:
        raise ValueError(f"{file} is damaged: its digest is not that of its other entries")
    for contradiction in _contradictions(document):
        raise ValueError(f"{file} contradicts itself: {contradiction}")
    return document


@lru_cache(maxsize=1)
def _validator() -> Any:
    schema = json.loads(files(__package__).joinpath("artifact.schema.json").read_text(encoding="utf-8"))
    # Following a reference takes as long as checking what it refers to, and a table has thirty.
    schema = _with_definitions(schema, schema.pop("$defs"))
    # JSON schema takes 1.0 for an integer; Python does not.
    kinds = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    extended = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
        jsonschema.Draft202012Validator, type_checker=kinds
    )
    return extended(schema)


def _with_definitions(schema: Any, definitions: Document) -> Any:
    """A schema with what ``{"$ref": "#/$defs/NAME"}`` refers to in its place."""
    if isinstance(schema, list):
        return [_with_definitions(value, definitions) for value in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        own = {key: value for key, value in schema.items() if key != "$ref"}
        return _with_definitions({**definitions[schema["$ref"].removeprefix("#/$defs/")], **own}, definitions)
    return {key: _with_definitions(value, definitions) for key, value in schema.items()}


def _without_repetition(pairs: list[tuple[str, Any]]) -> Document:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("an entry occurs twice")
    return entries


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _contradictions(document: Document) -> Iterator[str]:
    """What the schema cannot say: names that must be unique or known."""
    names = [collection["name"] for collection in document["collections"]]
    if len(set(names)) != len(names):
        yield f"its collections are {names}, one twice"
    files = [file for collection in document["collections"] for file in collection["files"]]
    if len(set(files)) != len(files) or not set(files) <= document["files"].keys():
        yield f"its collections lie in the files {sorted(files)}, it lists {sorted(document['files'])}"
    for collection in document["collections"]:
        if sorted(table["name"] for table in collection["tables"]) != sorted(collection["packed_order"]):
            yield f"collection {collection['name']!r} packs other tables than it has, or one twice"
