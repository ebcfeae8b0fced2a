"""Damaged, lying and incomplete artifacts are refused by one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import torchrec_mpe as mpe
from tests.inference.liars import TABLES, edit_manifest, edit_tensors, emitted
from torchrec_mpe.inference.artifact.opening import open_artifact
from torchrec_mpe.inference.artifact.tensor_files import sha256_of_header, sha256_of_tensor
from torchrec_mpe.packing.size import size_report


def _cut(name: str, bytes_left: int) -> Callable[[Path], Any]:
    def cut(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:bytes_left])

    return cut


def _with_header_signed(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def both(folder: Path) -> None:
        change(folder)
        edit_manifest(folder, lambda d: d["files"][TABLES].update(header_sha256=sha256_of_header(folder / TABLES)))

    return both


def _flip_bit(name: str, position: int) -> Callable[[Path], Any]:
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[position] ^= 4
        (folder / name).write_bytes(data)

    return flip


def _flip_first_byte(folder: Path) -> None:
    """Of the largest tensor, the weights."""
    _flip_bit(TABLES, 8 + int.from_bytes((folder / TABLES).read_bytes()[:8], "little"))(folder)


def _in_table(**entries: Any) -> Callable[[Path], Any]:
    return lambda f: edit_manifest(f, lambda d: d["collections"][0]["tables"][0].update(entries))


def _in_collection(**entries: Any) -> Callable[[Path], Any]:
    return lambda f: edit_manifest(f, lambda d: d["collections"][0].update(entries))


def _in_tensors(**digests: Any) -> Callable[[Path], Any]:
    return lambda f: edit_manifest(f, lambda d: d["files"][TABLES]["tensors"].update(digests))


def _in_header(old: str, new: str) -> Callable[[Path], Any]:
    """Something of equal length in a file's header, with a digest that fits."""

    def change(folder: Path) -> None:
        data = (folder / TABLES).read_bytes()
        assert data.count(old.encode()) == 1 and len(old) == len(new)
        (folder / TABLES).write_bytes(data.replace(old.encode(), new.encode()))

    return _with_header_signed(change)


def _set(name: str, position: Any, value: float) -> Callable[[Path], Any]:
    return lambda f: edit_tensors(f, lambda t: t[name].__setitem__(position, value))


def _repeat_entry(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"version": 5', '"version": 5, "version": 5'))


def _header_length(length: int) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        data = (folder / TABLES).read_bytes()
        (folder / TABLES).write_bytes(length.to_bytes(8, "little") + data[8:])

    return write


def _in_two_files(folder: Path) -> None:
    save_file({"beta": torch.zeros(3)}, folder / "tables-9-0.safetensors")
    entry = {
        "header_sha256": sha256_of_header(folder / "tables-9-0.safetensors"),
        "tensors": {"beta": sha256_of_tensor(torch.zeros(3))},
    }
    edit_manifest(folder, lambda d: d["files"].update({"tables-9-0.safetensors": entry}))
    _in_collection(files=[TABLES, "tables-9-0.safetensors"])(folder)


def _encoder(table: str) -> Callable[[Path], Any]:
    def add(folder: Path) -> None:
        edit_manifest(folder, lambda d: d["files"][TABLES]["tensors"].update({f"encoder.{table}": ""}))
        edit_tensors(folder, lambda t: t.update({f"encoder.{table}": torch.zeros(3, 3)}))

    return add


def _bytes_of_no_table(folder: Path) -> None:
    """A row's vector that no table reads."""
    edit_tensors(folder, lambda t: t.update(zero_rows=torch.cat([t["zero_rows"], torch.zeros(8)])))


AT_OPEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no json": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
    "no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe{}"), "manifest.json is damaged"),
    "lists in lists": (lambda f: (f / "manifest.json").write_text("[" * 10**5), "manifest.json is damaged"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "is not an artifact's manifest"),
    "an endless number": (lambda f: (f / "manifest.json").write_text("9" * 10**5), "manifest.json is damaged"),
    "a half character": (lambda f: edit_manifest(f, lambda d: d["metadata"].update(a="\ud800"), sign=False), "damaged"),
    "a NaN": (lambda f: edit_manifest(f, lambda d: d["metadata"].update(a=float("nan")), sign=False), "NaN is no JSON"),
    "an entry twice": (_repeat_entry, "an entry occurs twice"),
    "huge manifest": (lambda f: (f / "manifest.json").write_bytes(b" " * ((1 << 26) + 1)), "more than 67108864 bytes"),
    "other format": (lambda f: edit_manifest(f, lambda d: d.update(format="x")), "is not an artifact's manifest"),
    "later version": (lambda f: edit_manifest(f, lambda d: d.update(version=9)), "of version 9, this release reads"),
    "old version": (
        lambda f: edit_manifest(f, lambda d: d.update(version=4)),
        "of version 4, this release reads version 5: emit the model again",
    ),
    "bit of the manifest": (lambda f: edit_manifest(f, lambda d: d["metadata"].update(a=1), sign=False), "its digest"),
    "missing entry": (lambda f: edit_manifest(f, lambda d: d.pop("collections")), "'collections' is a required"),
    "unknown entry": (
        lambda f: edit_manifest(f, lambda d: d.update(pickle="x")),
        "schema at \\$: .*'pickle' was unexp",
    ),
    "no collections": (lambda f: edit_manifest(f, lambda d: d.update(collections=[])), "schema at \\$.collections"),
    "float rows": (_in_table(num_embeddings=12.0), r"tables\[0\].num_embeddings: 12.0 is not of type 'integer'"),
    "true rows": (_in_table(num_embeddings=True), "num_embeddings: True is not of type 'integer'"),
    "no rows": (_in_table(num_embeddings=0), "num_embeddings: 0 is less than"),
    "huge rows": (_in_table(num_embeddings=10**30), "num_embeddings: 1000"),
    "terminal codes": (_in_table(name="\x1b[31m"), "tables.0..name"),
    "other pooling": (_in_table(pooling="NONE"), "pooling: 'NONE' is not one of"),
    "no features": (_in_table(feature_names=[]), "feature_names"),
    "a feature twice": (_in_table(feature_names=["f", "f"]), "feature_names: .* has non-unique elements"),
    "lying rows": (_in_table(num_embeddings=10**9), "table t1: rows_per_table says 12 rows, not 1000000000"),
    "lying sum of widths": (_in_table(rows_per_width=[13, *[0] * 8]), "table t1: .* are not its 12 rows"),
    "lying widths": (_in_table(rows_per_width=[12, *[0] * 8]), "table t1: "),
    "other widths than the runs": (
        lambda f: edit_manifest(
            f, lambda d: d["collections"][0]["tables"][1].update(rows_per_width=[1, 1, 0, 3, 0, 1, 1, 1, 1])
        ),
        "table t2: it has .*, other bit-widths than the declared",
    ),
    "bits after the last row": (_set("directory", 40, 255), "table t1: it has .*, other bit-widths than the declared"),
    "encoder of plain rows": (_encoder("t1"), "table t1 is not coded and has an encoder"),
    "encoder of no table": (_encoder("t7"), "there is an encoder of table 't7', which is not there"),
    "path outside": (
        lambda f: edit_manifest(f, lambda d: d["files"].update({"../x.safetensors": d["files"][TABLES]})),
        "'../x.safetensors' does not match",
    ),
    "unlisted file": (_in_collection(files=["other.safetensors"]), r"its collections lie in the files .*it lists"),
    "a file of no tensor": (
        lambda f: edit_manifest(f, lambda d: d["files"][TABLES].update(tensors={})),
        "tensors: {} should be non-empty|tensors: {} does not have enough properties",
    ),
    "one tensor in two files": (_in_two_files, "tensor 'beta' is in another file too"),
    "a collection twice": (
        lambda f: edit_manifest(f, lambda d: d["collections"].append(d["collections"][0])),
        "its collections are .*, one twice",
    ),
    "a table twice": (_in_collection(packed_order=["t1", "t2"]), "packs other tables than it has, or one twice"),
    "a row of no table": (_bytes_of_no_table, "the tables account for .* bytes, their tensors hold"),
    "other shape": (_in_header('"F32","shape":[2,9]', '"F32","shape":[9,2]'), "alpha must be"),
    "other dtype": (_in_header('"F32","shape":[2,9]', '"I32","shape":[2,9]'), "alpha must be"),
    "a dtype unsigned": (_flip_bit(TABLES, 8 + len('{"weights":{"dtype":"')), "its header has another digest"),
    "other digest": (_in_tensors(run_starts="0" * 64), "tensor 'run_starts' has another digest"),
    "weighted mean": (_in_collection(is_weighted=True), "table t2: MEAN pooling takes no per-sample weights"),
    "truncated": (_cut(TABLES, 100), f"{TABLES} is damaged: it has no header"),
    "truncated by a byte": (_cut(TABLES, -1), f"{TABLES} is damaged: .*not fully covered"),
    "empty": (_cut(TABLES, 0), "it has no header"),
    "no header": (_cut(TABLES, 4), "it has no header"),
    "more than the header says": (
        lambda f: (f / TABLES).write_bytes((f / TABLES).read_bytes() + b"x"),
        "not fully covered",
    ),
    "long header": (_header_length(2**40), f"{TABLES} is damaged"),
    "endless header": (_header_length(2**64 - 1), f"{TABLES} is damaged"),
    "short header": (_header_length(10), f"{TABLES} is damaged"),
    "bit of the header": (_flip_bit(TABLES, 12), "its header has another digest"),
    "bit of the header, signed": (
        _with_header_signed(_flip_bit(TABLES, 12)),
        "disagree on whether it holds 'weights', 'wemghts'",
    ),
    "bit of a small tensor": (_flip_bit(TABLES, -1), "has another digest"),
    "base outside": (_set("run_records", (0, 0), 64 * 10**9), "table t2"),
    "negative base": (_set("run_records", (0, 0), -64), "table t2"),
    "width of 200": (_set("run_records", (0, 1), 200 << 32), "bit-widths between 0 and 8"),
    "bitmap keeps too much": (_set("directory", 7, 255), "table t1"),
    "runs fall": (_set("run_starts", 1, 0), "table t2"),
    "tables apart": (_set("weights_offsets", 1, 1), "multiple of 64"),
    "tables beyond": (_set("weights_offsets", 1, 2**62), "multiple of 64"),
    "directory beyond": (_set("directory_offsets", 0, 2**62), "directory must start"),
    "rows that are not": (_set("rows_per_table", 0, 2**31 - 1), "rows_per_table says 2147483647 rows, not 12"),
    "no such directory": (_set("directory_kinds", 0, 77), "no directory kind 77"),
    "not finite": (lambda f: edit_tensors(f, lambda t: t["alpha"].fill_(float("nan"))), "alpha must be finite"),
    "step size below 0": (_set("alpha", (0, 8), -1.0), "step sizes must be"),
    "beta outside": (lambda f: edit_tensors(f, lambda t: t["beta_offsets"].fill_(1000)), "beta offset 1000 leaves"),
    "zero row outside": (lambda f: edit_tensors(f, lambda t: t["zero_row_offsets"].fill_(99)), "zero row offset 99"),
    "no such scales": (_set("scale_index", 0, -1), "scale_index -1"),
    "missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("beta")),
        f"{TABLES} and the manifest disagree on whether it holds 'beta'",
    ),
    "other dtype stored": (
        lambda f: edit_tensors(f, lambda t: t.update(alpha=t["alpha"].int())),
        "alpha must be",
    ),
    "short weights": (
        lambda f: edit_tensors(f, lambda t: t.update(weights=t["weights"][:-64].clone())),
        "table t3|weights",
    ),
}

NOT_BEFORE_VERIFY: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit of the weights": (_flip_first_byte, "tensor 'weights' has another digest"),
    "nibble of 9 bits": (_set("directory", -40, 0x99), "table t3"),
    "widths after the last row": (
        _set("directory", -1, 0x11),
        "table t3: the nibble directory has widths after row 10",
    ),
    "other widths than the lines": (
        _in_table(rows_per_width=[4, 1, 0, 3, 0, 1, 1, 1, 1]),
        "table t1 has other bit-widths than the manifest says",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an artifact."""
    folder = tmp_path_factory.mktemp("saved") / "artifact"
    mpe.save(emitted(), folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def artifact(saved: dict[str, bytes], tmp_path: Path) -> Path:
    """A fresh copy."""
    for name, data in saved.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def _one_sentence(error: pytest.ExceptionInfo[ValueError]) -> bool:
    return 0 < len(str(error.value)) < 2000 and "\n" not in str(error.value)


@pytest.mark.supports("damaged artifacts are refused", "CPU")
@pytest.mark.parametrize("damage", AT_OPEN)
def test_refused_at_open(artifact: Path, damage: str) -> None:
    change, message = AT_OPEN[damage]
    open_artifact(artifact)
    change(artifact)
    for options in ({}, {"in_memory": True}, {"directories": False, "digests": False}):
        with pytest.raises(ValueError, match=message) as error:
            open_artifact(artifact, **options)
        assert _one_sentence(error)


@pytest.mark.supports("damaged artifacts are refused", "CPU")
@pytest.mark.parametrize("damage", NOT_BEFORE_VERIFY)
def test_refused_by_verify(artifact: Path, damage: str) -> None:
    change, message = NOT_BEFORE_VERIFY[damage]
    change(artifact)
    open_artifact(artifact, directories=False, digests=False)
    with pytest.raises(ValueError, match=message) as error:
        open_artifact(artifact)
    assert _one_sentence(error)


def test_missing_files_are_named(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no manifest.json"):
        open_artifact(tmp_path_factory.mktemp("empty"))
    (artifact / TABLES).unlink()
    with pytest.raises(FileNotFoundError, match=f"{TABLES} is missing"):
        open_artifact(artifact)


def test_tensors_are_on_the_pages_or_in_memory(artifact: Path) -> None:
    mapped, copied = (open_artifact(artifact, in_memory=m).collections["sparse.ebc"] for m in (False, True))
    for collection, text in ((mapped, True), (copied, False)):
        address = collection.packed_tables().weights.data_ptr()
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= address < end:
                assert line.endswith(str(artifact / TABLES)) == text
    assert mapped.packed_tables().weights.data_ptr() % 64 == 0
    torch.testing.assert_close(mapped.packed_tables().weights, copied.packed_tables().weights, rtol=0, atol=0)


def test_sizes_take_no_look_at_the_lines(artifact: Path) -> None:
    opened = open_artifact(artifact, directories=False, digests=False)
    collection = opened.collections["sparse.ebc"]
    by_name = {table["name"]: table["rows_per_width"] for table in opened.manifest["collections"][0]["tables"]}
    packed = collection.packed_tables()
    assert size_report(packed, [by_name[table.name] for table in packed.tables]) == collection.size_report()
