"""Artifacts come back as they were, or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.inference.models import Model, kjt, retrained, tables
from torchrec_mpe.digest import file_sha256
from torchrec_mpe.packing import TableToPack, pack_tables


def emitted() -> nn.Module:
    """A model with a bitmap, runs and nibbles."""
    torch.manual_seed(0)
    model = Model(retrained())
    for _ in range(3):
        model(kjt())
    return mpe.emit_inference_model(model, directory={"t1": "bitmap", "t2": "ranked", "t3": "nibble"})


@pytest.mark.parametrize("meta", [False, True])
def test_round_trip_of_a_model(tmp_path: Path, meta: bool) -> None:
    model = emitted()
    mpe.save(model, tmp_path / "artifact", metadata={"auc": 0.75})
    device = torch.device("meta" if meta else "cpu")
    with device:
        fresh = Model(EmbeddingBagCollection(tables(), device=device))
    loaded = mpe.load(tmp_path / "artifact", fresh)
    torch.testing.assert_close(loaded(kjt()), model(kjt()), rtol=1e-6, atol=1e-7)
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert manifest["metadata"] == {"auc": 0.75} and "torch" in manifest["versions"]
    assert manifest["collections"][0]["tables"][0]["feature_names"] == ["f1", "f2"]


def test_round_trip_of_the_collection(tmp_path: Path) -> None:
    model = emitted()
    mpe.save(model, tmp_path / "artifact")
    loaded = mpe.load(tmp_path / "artifact")
    assert isinstance(loaded, mpe.PackedEmbeddingBagCollection)
    torch.testing.assert_close(loaded(kjt()).values(), model.sparse["ebc"](kjt()).values(), rtol=0, atol=0)


def test_bytes_on_disk_are_the_reported_bytes(tmp_path: Path) -> None:
    model = emitted()
    mpe.save(model, tmp_path / "artifact")
    file = tmp_path / "artifact" / "tables-0.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - 8 - header == model.sparse["ebc"].size_report().total


def test_no_pickle_anywhere(tmp_path: Path) -> None:
    mpe.save(emitted(), tmp_path / "artifact")
    names = {p.name for p in (tmp_path / "artifact").iterdir()}
    assert names == {"manifest.json", "tables-0.safetensors", "dense.safetensors"}


def test_saving_needs_a_packed_model_and_a_free_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no PackedEmbeddingBagCollection"):
        mpe.save(nn.Linear(1, 1), tmp_path / "artifact")
    mpe.save(emitted(), tmp_path / "artifact")
    with pytest.raises(FileExistsError, match="already exists"):
        mpe.save(emitted(), tmp_path / "artifact")


def test_nothing_is_left_of_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchrec_mpe.inference.artifact.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        mpe.save(emitted(), tmp_path / "artifact")
    assert not list(tmp_path.iterdir())


def _edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "manifest.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def _edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """A liar that also fixes the digest."""
    file = folder / "tables-0.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)

    def digest(document: dict[str, Any]) -> None:
        document["collections"][0]["tensors"].update(bytes=file.stat().st_size, sha256=file_sha256(file))

    _edit_manifest(folder, digest)


def _flip_bit(folder: Path) -> None:
    file = folder / "tables-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-40] ^= 4
    file.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: (f / "tables-0.safetensors").write_bytes(b"abc"), "size or digest"),
    "flipped bit": (_flip_bit, "size or digest"),
    "no json": (lambda f: (f / "manifest.json").write_text("{"), "is damaged"),
    "other format": (lambda f: _edit_manifest(f, lambda d: d.update(format="x")), "does not describe"),
    "other version": (lambda f: _edit_manifest(f, lambda d: d.update(version=9)), "of version 9"),
    "old version": (lambda f: _edit_manifest(f, lambda d: d.update(version=1)), "earlier pre-release.*emit the model"),
    "missing entry": (lambda f: _edit_manifest(f, lambda d: d.pop("collections")), "is damaged"),
    "path outside": (
        lambda f: _edit_manifest(f, lambda d: d["collections"][0]["tensors"].update(file="../x")),
        "outside its folder",
    ),
    "lying rows": (
        lambda f: _edit_manifest(f, lambda d: d["collections"][0]["tables"][0].update(num_embeddings=10**9)),
        "does not hold what the manifest says",
    ),
    "lying widths": (
        lambda f: _edit_manifest(f, lambda d: d["collections"][0]["tables"][0].update(rows_per_width=[0] * 9)),
        "other bit-widths",
    ),
    "base outside": (
        lambda f: _edit_tensors(f, lambda t: t["run_records"][0].__setitem__(0, 64 * 10**9)),
        "does not hold",
    ),
    "negative base": (lambda f: _edit_tensors(f, lambda t: t["run_records"][0].__setitem__(0, -64)), "does not hold"),
    "bitmap outside": (lambda f: _edit_tensors(f, lambda t: t["directory"].__setitem__(15, 255)), "does not hold"),
    "other directory": (
        lambda f: _edit_manifest(f, lambda d: d["collections"][0]["tables"][0].update(directory="ranked")),
        "another directory",
    ),
    "runs fall": (lambda f: _edit_tensors(f, lambda t: t["run_starts"].__setitem__(1, 0)), "does not hold"),
    "tables apart": (lambda f: _edit_tensors(f, lambda t: t["weights_offsets"].__setitem__(1, 1)), "does not hold"),
    "not finite": (lambda f: _edit_tensors(f, lambda t: t["alpha"].fill_(float("nan"))), "does not hold"),
    "missing tensor": (lambda f: _edit_tensors(f, lambda t: t.pop("beta")), "does not hold"),
    "other dtype": (lambda f: _edit_tensors(f, lambda t: t.update(weights=t["weights"].int())), "does not hold"),
    "beta outside": (lambda f: _edit_tensors(f, lambda t: t["beta_offsets"].fill_(1000)), "does not hold"),
    "short weights": (lambda f: _edit_tensors(f, lambda t: t.update(weights=t["weights"][:-64].clone())), "does not"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_artifacts_are_refused(tmp_path: Path, damage: str) -> None:
    mpe.save(emitted(), tmp_path / "artifact")
    apply, message = DAMAGE[damage]
    apply(tmp_path / "artifact")
    with pytest.raises(ValueError, match=message):
        mpe.load(tmp_path / "artifact")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no manifest.json"):
        mpe.load(tmp_path)
    mpe.save(emitted(), tmp_path / "artifact")
    (tmp_path / "artifact" / "tables-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"tables-0.safetensors is missing"):
        mpe.load(tmp_path / "artifact")


def test_the_model_must_fit(tmp_path: Path) -> None:
    mpe.save(emitted(), tmp_path / "artifact")
    with pytest.raises(ValueError, match=r"sparse.ebc, the model has not"):
        mpe.load(tmp_path / "artifact", nn.Linear(1, 1))
    other = Model(EmbeddingBagCollection(tables()))
    other.over = nn.Linear(17, 2)
    with pytest.raises(ValueError, match=r"does not fit the model: over.bias, over.weight"):
        mpe.load(tmp_path / "artifact", other)


def test_a_model_that_does_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    mpe.save(emitted(), tmp_path / "artifact")
    other = Model(EmbeddingBagCollection(tables()))
    other.over = nn.Linear(17, 2)
    renamed = tables()
    renamed[0].name = "elsewhere"
    for model, message in ((other, "does not fit the model"), (Model(EmbeddingBagCollection(renamed)), "elsewhere")):
        with pytest.raises(ValueError, match=message):
            mpe.load(tmp_path / "artifact", model)
        assert type(model.sparse["ebc"]) is EmbeddingBagCollection


def test_tables_packed_in_another_order_keep_their_rows(tmp_path: Path) -> None:
    """Two tables of one shape and width: swapped, they would pass every other check."""
    widths = mpe.TableBitWidths(4, 8, (0, 4), (8,))
    rows = {"a": torch.zeros(4, 8), "b": torch.ones(4, 8)}
    alpha = torch.tensor([0.0] + [1.0] * 8)
    packed = pack_tables(
        [TableToPack(n, widths, lambda i, j, n=n: rows[n][i:j], alpha, torch.zeros(8)) for n in ("a", "b")]
    )
    configs = [EmbeddingBagConfig(name=n, num_embeddings=4, embedding_dim=8, feature_names=[n]) for n in ("b", "a")]
    mpe.save(mpe.PackedEmbeddingBagCollection(configs, packed), tmp_path / "artifact")
    features = KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor([2, 2]), torch.tensor([1, 1]))
    out = mpe.load(tmp_path / "artifact")(features)
    assert out["a"].tolist() == [[0.0] * 8] and out["b"].tolist() == [[1.0] * 8]
