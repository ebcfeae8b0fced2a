"""The published schema is what is checked."""

import hashlib
import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomllib

import torchrec_mpe as mpe
from tests.inference.liars import emitted
from torchrec_mpe.files.document import document_sha256
from torchrec_mpe.inference.artifact.manifest import SCHEMA_ID, read_manifest, write_manifest


def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(
        files("torchrec_mpe.inference.artifact").joinpath("artifact.schema.json").read_text()
    )
    return schema


def test_anybody_can_check_a_manifest(tmp_path: Path) -> None:
    mpe.save(emitted(), tmp_path / "artifact")
    document = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    jsonschema.Draft202012Validator.check_schema(_schema())
    jsonschema.validate(document, _schema())
    assert document["$schema"] == _schema()["$id"] == SCHEMA_ID


def _objects(schema: Any) -> list[dict[str, Any]]:
    own = [schema] if isinstance(schema, dict) and "properties" in schema else []
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    return own + [found for value in inner for found in _objects(value)]


def test_no_entry_is_optional_or_unknown() -> None:
    described = [s for s in _objects(_schema()) if s["type"] == "object"]
    assert len(described) >= 6
    for schema in described:
        assert schema["additionalProperties"] is False or isinstance(schema["additionalProperties"], dict)
        if schema["additionalProperties"] is False:
            assert sorted(schema["required"]) == sorted(schema["properties"])


def test_the_package_ships_the_schema() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert "inference/artifact/artifact.schema.json" in project["tool"]["setuptools"]["package-data"]["torchrec_mpe"]


def test_what_cannot_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not follow its schema"):
        write_manifest(tmp_path, {"provenance": {}, "metadata": {}, "files": {}, "collections": []})


def test_the_digest_is_as_the_schema_says() -> None:
    document = {"b": [1, 2.5, "é"], "a": {"y": None, "x": True}, "sha256": "anything"}
    text = '{"a":{"x":true,"y":null},"b":[1,2.5,"é"]}'
    assert document_sha256(document) == hashlib.sha256(text.encode()).hexdigest()


def test_a_thousand_tables_are_read_within_a_second(tmp_path: Path) -> None:
    mpe.save(emitted(), tmp_path / "artifact")
    document = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    collection = document["collections"][0]
    one, copies = collection["tables"][0], 1000
    collection["tables"] = [{**one, "name": f"t{k}"} for k in range(copies)]
    collection["packed_order"] = [table["name"] for table in collection["tables"]]
    document["sha256"] = document_sha256(document)
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    seconds = []
    for _ in range(3):
        started = time.process_time()
        read_manifest(tmp_path)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1
