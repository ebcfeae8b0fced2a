"""Artifacts come back as they were."""

import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.inference.liars import TABLES, edit_manifest, edit_tensors, emitted
from tests.inference.models import Model, kjt, tables
from torchrec_mpe.files.digest import file_sha256
from torchrec_mpe.inference.artifact.tensor_files import sha256_of_header
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables


@pytest.mark.supports("save and load", "CPU")
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_round_trip_of_a_model(tmp_path: Path, meta: bool, mmap: bool) -> None:
    model = emitted()
    mpe.save(model, tmp_path / "artifact", metadata={"auc": 0.75, "é": None})
    device = torch.device("meta" if meta else "cpu")
    with device:
        fresh = Model(EmbeddingBagCollection(tables(), device=device))
    loaded = mpe.load(tmp_path / "artifact", fresh, mmap=mmap)
    assert loaded is fresh and not loaded.training
    torch.testing.assert_close(loaded(kjt()), model(kjt()), rtol=0, atol=0)
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert manifest["metadata"] == {"auc": 0.75, "é": None} and "torch" in manifest["provenance"]["versions"]
    assert manifest["collections"][0]["tables"][0]["feature_names"] == ["f1", "f2"]


@pytest.mark.parametrize("backend", ["packed", "fbgemm"])
@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip_of_the_collection(tmp_path: Path, mmap: bool, backend: str) -> None:
    model = emitted()
    mpe.save(model, tmp_path / "artifact")
    loaded = mpe.load(tmp_path / "artifact", mmap=mmap, backend=backend)
    assert isinstance(loaded, mpe.PackedEmbeddingBagCollection) and loaded.backend() == backend
    tolerance = 0 if backend == "packed" else 1e-3  # FBGEMM's step sizes are float16
    torch.testing.assert_close(
        loaded(kjt()).values(), model.sparse["ebc"](kjt()).values(), rtol=tolerance, atol=tolerance
    )


def test_round_trip_into_a_model_that_is_a_collection(tmp_path: Path) -> None:
    collection = emitted().sparse["ebc"]
    mpe.save(collection, tmp_path / "artifact")
    loaded = mpe.load(tmp_path / "artifact", EmbeddingBagCollection(tables()))
    torch.testing.assert_close(loaded(kjt()).values(), collection(kjt()).values(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="has tables"):
        mpe.load(tmp_path / "artifact", EmbeddingBagCollection(tables()[:1]))


def test_several_collections(tmp_path: Path) -> None:
    one = emitted().sparse["ebc"]
    mpe.save(nn.ModuleDict({"a": nn.ModuleDict({"b": one}), "d": emitted()}), tmp_path / "x")
    loaded = mpe.load(tmp_path / "x")
    assert list(loaded) == ["a_b", "d_sparse_ebc"]


def test_collections_of_one_name_are_refused(tmp_path: Path) -> None:
    one, other = emitted().sparse["ebc"], emitted().sparse["ebc"]
    mpe.save(nn.ModuleDict({"a": nn.ModuleDict({"b": one}), "a_b": other}), tmp_path / "x")
    with pytest.raises(ValueError, match=r"\['a.b', 'a_b'\] have one name with dots as underscores"):
        mpe.load(tmp_path / "x")


def test_bytes_on_disk_are_the_reported_bytes(tmp_path: Path) -> None:
    model = emitted()
    mpe.save(model, tmp_path / "artifact")
    file = tmp_path / "artifact" / TABLES
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - 8 - header == model.sparse["ebc"].size_report().total
    assert load_file(file).keys() == model.sparse["ebc"].packed_tables().tensors().keys()


def test_no_pickle_anywhere(tmp_path: Path) -> None:
    mpe.save(emitted(), tmp_path / "artifact")
    names = {p.name for p in (tmp_path / "artifact").iterdir()}
    assert names == {"manifest.json", TABLES, "dense-0.safetensors"}


def test_files_of_bounded_size(tmp_path: Path) -> None:
    model = emitted()
    mpe.save(model, tmp_path / "artifact", max_file_bytes=300)
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "artifact").iterdir() if p.suffix == ".safetensors"}
    assert len(sizes) > 4
    for name in sizes:
        tensors = load_file(tmp_path / "artifact" / name)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 300
    loaded = mpe.load(tmp_path / "artifact", Model(EmbeddingBagCollection(tables())), mmap=True, verify=True)
    torch.testing.assert_close(loaded(kjt()), model(kjt()), rtol=0, atol=0)


def test_saving_needs_a_packed_model_and_a_free_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no PackedEmbeddingBagCollection"):
        mpe.save(nn.Linear(1, 1), tmp_path / "artifact")
    for metadata in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(ValueError, match="metadata must be JSON values"):
            mpe.save(emitted(), tmp_path / "artifact", metadata=metadata)
    mpe.save(emitted(), tmp_path / "artifact")
    with pytest.raises(FileExistsError, match="already exists"):
        mpe.save(emitted(), tmp_path / "artifact")


def test_nothing_is_left_of_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchrec_mpe.inference.artifact.save_load.write_manifest", full_disk)
    with pytest.raises(OSError, match="No space left"):
        mpe.save(emitted(), tmp_path / "artifact")
    assert not list(tmp_path.iterdir())


def test_without_verify_lookups_still_stay_inside(tmp_path: Path) -> None:
    """A row directory that leads astray: found by verify, at a GPU's door, and otherwise by the lookup."""
    mpe.save(emitted(), tmp_path / "artifact")
    edit_tensors(tmp_path / "artifact", lambda t: t["directory"].view(-1, 64)[-1].fill_(0x88))
    for options in ({}, {"mmap": True, "verify": True}, {"mmap": True, "backend": "fbgemm"}):
        with pytest.raises(ValueError, match="table t3"):
            mpe.load(tmp_path / "artifact", **options)
    with pytest.raises(ValueError, match="table t3"):
        mpe.load(tmp_path / "artifact", mmap=True, device="meta")
    loaded = mpe.load(tmp_path / "artifact", mmap=True)
    with pytest.raises(ValueError, match="table t3, feature f2: the table's directory or runs lead outside its rows"):
        loaded(kjt())


def test_verify_reads_what_opening_does_not(tmp_path: Path) -> None:
    mpe.save(emitted(), tmp_path / "artifact")
    for name in (TABLES, "dense-0.safetensors"):
        file = tmp_path / "artifact" / name
        before = file.read_bytes()
        end = int.from_bytes(before[:8], "little") + 8  # the largest tensor is the first
        file.write_bytes(before[:end] + bytes([before[end] ^ 4]) + before[end + 1 :])
        if name == TABLES:
            mpe.load(tmp_path / "artifact", mmap=True)
        else:  # a model that answers nothing but NaN is not to be found out by its users
            with pytest.raises(ValueError, match=f"{name} is damaged: tensor '.*' has another digest"):
                mpe.load(tmp_path / "artifact", mmap=True)
        with pytest.raises(ValueError, match=f"{name} is damaged: tensor '.*' has another digest"):
            mpe.load(tmp_path / "artifact", mmap=True, verify=True)
        with pytest.raises(ValueError, match="has another digest"):
            mpe.load(tmp_path / "artifact")
        file.write_bytes(before)


def sparse_artifact(folder: Path, gigabytes: int) -> int:
    """An artifact of one table of 8-bit zeros that takes no disk; returns its rows."""
    small, rows = 1 << 10, gigabytes << 24  # of 64 bytes
    alpha = torch.tensor([0.0] + [1.0] * 8)
    widths = TableBitWidths(small, 64, (0, small), (8,))
    zeros = torch.zeros(small, 64)
    packed = pack_tables([TableToPack("t", widths, lambda i, j: zeros[i:j], alpha, torch.ones(64))])
    config = EmbeddingBagConfig(name="t", num_embeddings=small, embedding_dim=64, feature_names=["f"])
    mpe.save(mpe.PackedEmbeddingBagCollection([config], packed), folder, max_file_bytes=small * 64)
    edit_tensors(folder, lambda t: t["rows_per_table"].fill_(rows), "tables-0-1.safetensors")
    weights, size = folder / "tables-0-0.safetensors", rows * 64 + 64
    header = json.dumps({"weights": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-(8 + len(header)) % 64)
    with weights.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)

    def grow(document: dict[str, Any]) -> None:
        document["collections"][0]["tables"][0].update(num_embeddings=rows, rows_per_width=[0] * 8 + [rows])
        document["files"][weights.name]["header_sha256"] = sha256_of_header(weights)

    edit_manifest(folder, grow)
    return rows


@pytest.mark.supports("load(mmap=True): 10 GB open within a second", "CPU")
def test_ten_gigabytes_open_within_a_second(tmp_path: Path) -> None:
    rows = sparse_artifact(tmp_path / "artifact", 10)
    started = time.perf_counter()
    loaded = mpe.load(tmp_path / "artifact", mmap=True)
    seconds = time.perf_counter() - started
    ids = torch.tensor([0, rows - 1])
    out = loaded(KeyedJaggedTensor.from_lengths_sync(["f"], ids, torch.tensor([1, 1])))["f"]
    torch.testing.assert_close(out, torch.full((2, 64), 1.0 - 128), rtol=0, atol=0)
    assert loaded.nbytes > 10 << 30
    assert seconds < 1


def test_an_artifact_larger_than_the_memory_opens(tmp_path: Path) -> None:
    with Path("/proc/meminfo").open() as lines:
        memory = sum(int(line.split()[1]) for line in lines if line.startswith(("MemTotal", "SwapTotal"))) >> 20
    gigabytes = memory + 8
    if gigabytes > 127:
        pytest.skip(f"a table has at most 2**31 - 1 rows, 128 GiB of 64 bytes; this host has {memory} GiB")
    sparse_artifact(tmp_path / "artifact", gigabytes)
    assert mpe.load(tmp_path / "artifact", mmap=True).nbytes > gigabytes << 30


def _read(folder: Path, writes: bool, connection: Connection) -> None:
    """Map, read all, and say how the kernel accounts for the pages once everybody has."""
    torch.set_num_threads(1)  # threads do not survive a fork
    weights = mpe.load(folder, mmap=True).packed_tables().weights.numpy()
    weights.sum()
    if writes:
        weights[: 1 << 20] = 7
    connection.send("ready")
    connection.recv()
    mine, kibibytes = False, dict.fromkeys(("Rss:", "Pss:", "Shared_Clean:", "Private_Dirty:"), 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name:
            mine = line.endswith(f"{folder.name}/tables-0-0.safetensors")
        elif mine and name in kibibytes:
            kibibytes[name] += int(rest[0])
    connection.send(tuple(kibibytes.values()))


@pytest.mark.supports("load(mmap=True): processes share pages", "CPU")
def test_processes_share_pages_and_keep_their_writes(tmp_path: Path) -> None:
    """32 MiB read by two processes: half of each page counts for each. A third writes 1 MiB: it has copies of that."""
    rows = 1 << 19
    widths = TableBitWidths(rows, 64, (0, rows), (8,))
    values = torch.randn(1 << 10, 64).repeat(rows >> 10, 1)
    alpha = torch.tensor([0.0] + [0.1] * 8)
    packed = pack_tables([TableToPack("t", widths, lambda i, j: values[i:j], alpha, torch.zeros(64))])
    config = EmbeddingBagConfig(name="t", num_embeddings=rows, embedding_dim=64, feature_names=["f"])
    mpe.save(mpe.PackedEmbeddingBagCollection([config], packed), tmp_path / "artifact", max_file_bytes=rows * 64)
    digest = file_sha256(tmp_path / "artifact" / "tables-0-0.safetensors")
    context = multiprocessing.get_context("fork")
    processes, connections = [], []
    try:
        for writes in (False, False, True):
            here, there = context.Pipe()
            processes.append(context.Process(target=_read, args=(tmp_path / "artifact", writes, there), daemon=True))
            processes[-1].start()
            connections.append(here)
        for connection in connections:
            assert connection.poll(60) and connection.recv() == "ready"
        numbers = []
        for connection in connections:  # one after the other: all have the pages until each has counted
            connection.send("count")
            assert connection.poll(60)
            numbers.append(connection.recv())
            if len(numbers) == 1:
                rss, pss, shared, dirty = numbers[0]
                assert rss >= 32 << 10 and shared >= 32 << 10 and pss < rss * 0.55 and dirty == 0
        assert 1 << 10 <= numbers[2][3] < 2 << 10
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert file_sha256(tmp_path / "artifact" / "tables-0-0.safetensors") == digest


def test_the_model_must_fit(tmp_path: Path) -> None:
    mpe.save(emitted(), tmp_path / "artifact")
    with pytest.raises(ValueError, match=r"sparse.ebc, the model has not"):
        mpe.load(tmp_path / "artifact", nn.Linear(1, 1))
    other = Model(EmbeddingBagCollection(tables()))
    other.over = nn.Linear(17, 2)
    with pytest.raises(
        ValueError, match=r"do not fit the model: over.bias is torch.float32 \[1\], the model's is torch.float32 \[2\]"
    ):
        mpe.load(tmp_path / "artifact", other)


def test_a_model_that_does_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    mpe.save(emitted(), tmp_path / "artifact")
    other = Model(EmbeddingBagCollection(tables()))
    other.over = nn.Linear(17, 2)
    renamed = tables()
    renamed[0].name = "elsewhere"
    half, more = Model(EmbeddingBagCollection(tables())), Model(EmbeddingBagCollection(tables()))
    half.over.half()
    more.under = nn.Linear(2, 2)
    for model, message in (
        (other, "do not fit the model"),
        (half, r"do not fit the model: over.bias is torch.float32 \[1\], the model's is torch.float16 \[1\]"),
        (more, r"do not fit the model: under.bias \(not in the artifact\), under.weight"),
        (Model(EmbeddingBagCollection(renamed)), "elsewhere"),
    ):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for mmap in (False, True):
            with pytest.raises(ValueError, match=message):
                mpe.load(tmp_path / "artifact", model, mmap=mmap)
        assert type(model.sparse["ebc"]) is EmbeddingBagCollection
        for key, value in model.state_dict().items():
            assert value.dtype == before[key].dtype and torch.equal(value, before[key])


def test_mapping_into_a_model_takes_no_look_at_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpe.save(emitted(), tmp_path / "artifact")
    model: Any = Model(EmbeddingBagCollection(tables()))

    def scan(*arguments: Any) -> None:
        raise AssertionError("the directories were read")

    monkeypatch.setattr("torchrec_mpe.inference.artifact.opening.size_report", lambda *arguments: None)
    monkeypatch.setattr("torchrec_mpe.inference.packed_table_batched_embedding_bags.validate_packed_tables", scan)
    loaded = mpe.load(tmp_path / "artifact", model, mmap=True)
    assert loaded is model and isinstance(model.sparse["ebc"], mpe.PackedEmbeddingBagCollection)


def test_tables_packed_in_another_order_keep_their_rows(tmp_path: Path) -> None:
    """Two tables of one shape and width: swapped, they would pass every other check."""
    widths = TableBitWidths(4, 8, (0, 4), (8,))
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
