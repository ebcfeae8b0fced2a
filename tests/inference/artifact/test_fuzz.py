"""Artifacts damaged at random either load and look up without harm, or end in one sentence.

``pytest tests/inference --fuzz-seconds 600 --fuzz-seed 7 -k fuzz`` goes on for longer, from another seed.
"""

import contextlib
import hashlib
import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import torchrec_mpe as mpe
from tests.inference.liars import TABLES, emitted
from tests.inference.models import kjt, tables
from tests.ops.every_backend import CPU, on
from tests.packing.random_codings import coded_table, random_coding
from torchrec_mpe.files.document import document_sha256
from torchrec_mpe.inference.artifact.tensor_files import DTYPES
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.packing.pack import pack_tables

# What a load of these files of a few KiB may take on top of the process: the loader's own code and caches.
GROWTH_KIB = 64 << 10
Files = dict[str, bytes]

NUMBERS = (
    0,
    1,
    -1,
    7,
    8,
    9,
    63,
    64,
    127,
    255,
    2**16,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    10**40,
)
VALUES: tuple[Any, ...] = (
    *NUMBERS, None, True, 1.5, -0.0, 1e308, "", "x", "..", "/etc/passwd", "../manifest.json", TABLES, "\x00", "é\ud800",
    [], {}, [[]], {"": 0}, "F64", "U8", "remap", "nibble", "bitmap_nibble", "MEAN", "a" * 3000,
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON document with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def change_document(document: Any, choose: random.Random) -> None:
    container, key = choose.choice(places(document))
    match choose.randrange(5):
        case 0 if isinstance(container, dict):
            del container[key]
        case 1 if isinstance(container, dict):
            container[choose.choice(["x", "file", "weights", "", "__metadata__"])] = container[key]
        case 2:
            other, other_key = choose.choice(places(document))
            container[key] = json.loads(json.dumps(other[other_key]))
        case 3 if isinstance(container[key], int):
            container[key] += choose.choice([1, -1, 64, -64, 2**20, 2**40])
        case _:
            container[key] = choose.choice(VALUES)


def in_manifest(files: Files, choose: random.Random) -> None:
    """Entries changed, as a rule with a digest that fits."""
    document = json.loads(files["manifest.json"])
    for _ in range(choose.randint(1, 3)):
        change_document(document, choose)
    if isinstance(document, dict) and choose.random() < 0.9:
        with contextlib.suppress(ValueError):
            document["sha256"] = document_sha256(document)
    files["manifest.json"] = json.dumps(document).encode()


def in_header(files: Files, choose: random.Random) -> None:
    """Entries of a safetensors header changed."""
    name = choose.choice([name for name in files if name != "manifest.json"])
    data = files[name]
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for _ in range(choose.randint(1, 2)):
        change_document(header, choose)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % choose.choice([1, 8, 64]))
    files[name] = len(text).to_bytes(8, "little") + text + data[end:]
    fit(files, name)


def in_bytes(files: Files, choose: random.Random) -> None:
    """Bits flipped, bytes cut off or doubled anywhere."""
    name = choose.choice(list(files))
    data = bytearray(files[name])
    for _ in range(choose.randint(1, 4)):
        at = choose.randrange(len(data))
        match choose.randrange(4):
            case 0:
                del data[at : at + choose.choice([1, 8, 64, 10**6])]
            case 1:
                data[at:at] = data[at : at + choose.choice([1, 8, 64, 1000])]
            case _:
                data[at] ^= 1 << choose.randrange(8)
        if not data:
            break
    files[name] = bytes(data)
    if choose.random() < 0.5:
        fit(files, name)


def in_tensors(files: Files, choose: random.Random) -> None:
    """Numbers of tensors changed, every digest fits: only what the numbers say can be wrong."""
    document = json.loads(files["manifest.json"])
    tensors = document["files"][TABLES]["tensors"]
    data = bytearray(files[TABLES])
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for _ in range(choose.randint(1, 3)):
        name = choose.choice([*tensors, *["directory"] * 10])
        low, high = (start + offset for offset in header[name]["data_offsets"])
        size = DTYPES[header[name]["dtype"]].itemsize
        if low == high:
            continue
        at = low + choose.randrange((high - low) // size) * size
        number = choose.choice(NUMBERS) if choose.random() < 0.5 else choose.getrandbits(8 * size)
        if choose.random() < 0.3:
            number = int.from_bytes(data[at : at + size], "little") + choose.choice([1, -1, 64, -64])
        data[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
    files[TABLES] = bytes(data)
    for name in tensors:
        low, high = (start + offset for offset in header[name]["data_offsets"])
        tensors[name] = hashlib.sha256(data[low:high]).hexdigest()
    document["sha256"] = document_sha256(document)
    files["manifest.json"] = json.dumps(document).encode()


def fit(files: Files, name: str) -> None:
    """Make the digest of the file's header fit."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        document = json.loads(files["manifest.json"])
        header = files[name][: 8 + int.from_bytes(files[name][:8], "little")]
        document["files"][name]["header_sha256"] = hashlib.sha256(header).hexdigest()
        document["sha256"] = document_sha256(document)
        files["manifest.json"] = json.dumps(document).encode()


DAMAGE: tuple[Callable[[Files, random.Random], None], ...] = (in_manifest, in_header, in_bytes, in_tensors)


def look_up(model: torch.nn.Module, backend: str) -> int:
    """Look up good and bad ids in every mode; returns how many lookups said that a directory is damaged."""
    refused = 0
    features = kjt()
    ids = features.values()
    ids[::7], ids[3::11] = -1, 2**40
    for collection in model.modules():
        if not isinstance(collection, mpe.PackedEmbeddingBagCollection):
            continue
        for mode in BoundsCheckMode:
            collection.tbe.bounds_check_mode = mode
            try:
                with on(backend):
                    collection(features)
            except (IndexError, KeyError, ValueError) as error:
                assert str(error)
                refused += "lead outside its rows" in str(error)
    return refused


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Files]:
    """Of every kind of directory, and of coded tables."""
    made: list[Files] = []
    models = [emitted({"t1": "remap"}), emitted({"t1": "bitmap", "t3": "nibble"}), emitted()]
    coded = [
        coded_table(t.name, *random_coding(k, t.num_embeddings, t.embedding_dim, 4, remap=k == 0))
        for k, t in enumerate(tables())
    ]
    models[-1].sparse["ebc"] = mpe.PackedEmbeddingBagCollection(tables(), pack_tables(coded))
    for k, model in enumerate(models):
        folder = tmp_path_factory.mktemp("artifact") / str(k)
        mpe.save(model, folder, metadata={"a": [1, {"b": "c"}]})
        made.append({file.name: file.read_bytes() for file in folder.iterdir()})
    return made


@pytest.mark.timeout(0)  # the option says how long
def test_fuzz(artifacts: list[Files], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seconds = request.config.getoption("--fuzz-seconds")
    first = seed = request.config.getoption("--fuzz-seed")
    started, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = dict.fromkeys(("loaded", "refused", "lookup refused"), 0)
    while time.monotonic() - started < seconds:
        seed += 1
        choose = random.Random(seed)
        files = dict(choose.choice(artifacts))
        choose.choice(DAMAGE)(files, choose)
        for file in tmp_path.iterdir():
            file.unlink()
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        mmap = choose.random() < 0.7
        try:
            model = mpe.load(tmp_path, mmap=mmap)
        except (ValueError, FileNotFoundError) as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 5000, f"seed {seed}: {error}"
            outcomes["refused"] += 1
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        outcomes["loaded"] += 1
        refused = look_up(model, choose.choice(CPU))
        assert mmap or not refused, f"seed {seed}: loading checked a directory that a lookup refuses"
        outcomes["lookup refused"] += refused > 0
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert growth < GROWTH_KIB, f"a few KiB of files took {growth} KiB"
    assert seed - first > 100 and min(outcomes.values()) > 0, outcomes
