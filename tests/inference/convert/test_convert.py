"""Checkpoints to packed models, and the errors that are told, against reading rows by hand."""

from pathlib import Path

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.inference.convert.checkpoints import FORMATS, SHAPES, configs, counts, model, write
from torchrec_mpe.inference.convert.checkpoint_tables import CheckpointTable
from torchrec_mpe.inference.convert.convert import Conversion, convert_checkpoint


def packed_rows(found: Conversion, name: str) -> torch.Tensor:
    """Every row, by the model's own forward with one id a bag."""
    for collection in found.collections():
        for config in collection.embedding_bag_configs():
            if config.name == name:
                features = collection.embedding_bag_configs()
                ids = {
                    f: torch.arange(config.num_embeddings if t.name == name else 0)
                    for t in features
                    for f in t.feature_names
                }
                lengths = torch.cat(
                    [torch.full((config.num_embeddings,), int(len(v) > 0), dtype=torch.int64) for v in ids.values()]
                )
                weights = torch.ones(config.num_embeddings) if collection.is_weighted() else None
                kjt = KeyedJaggedTensor(list(ids), torch.cat(list(ids.values())), weights, lengths)
                return collection(kjt)[config.feature_names[0]]
    raise AssertionError(name)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return model().state_dict()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_model(kind: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    tables = [CheckpointTable(config) for config in configs()]
    path = write(state, kind, tmp_path)
    found = convert_checkpoint(path, tables, counts(), ratio=6, allow_pickle=True)
    (collection,) = found.collections()
    report = collection.size_report()
    assert report.total <= report.fp32_bytes / 6
    for config in configs():
        rows = state[f"sparse.embedding_bags.{config.name}.weight"]
        packed = packed_rows(found, config.name)
        weights = counts()[config.name].double()
        off, square = (rows - packed).double().square().sum(1), rows.double().square().sum(1)
        errors = found.errors[config.name]
        assert errors.weighted_relative_rms == pytest.approx(float((weights @ off / (weights @ square)).sqrt()))
        assert errors.relative_rms == pytest.approx(float((off.sum() / square.sum()).sqrt()))
        assert errors.max_abs_error == pytest.approx(float((rows - packed).abs().max()))
        assert 0 < errors.relative_rms < 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = model(dtype).state_dict()
    half = convert_checkpoint(write(state, "torch", tmp_path), counts=counts(), max_error=0.1)
    widened = tmp_path / "widened"
    widened.mkdir()
    wide = convert_checkpoint(
        write({k: v.float() for k, v in state.items()}, "torch", widened), counts=counts(), max_error=0.1
    )
    assert half.plan.tables == wide.plan.tables and half.errors == wide.errors
    for errors in half.errors.values():
        assert errors.weighted_relative_rms is not None and errors.weighted_relative_rms <= 0.1


def test_rows_are_never_read_all_at_once(
    state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(state, "safetensors", tmp_path)
    whole = convert_checkpoint(path, counts=counts(), ratio=6)
    monkeypatch.setattr("torchrec_mpe.precision.row_histograms._CHUNK_ELEMENTS", 320)
    monkeypatch.setattr("torchrec_mpe.packing.pack._CHUNK_ELEMENTS", 320)
    largest = 0
    from torchrec_mpe.inference.convert.checkpoint_files import _SafetensorsFiles

    read = _SafetensorsFiles.rows

    def rows(self: _SafetensorsFiles, key: str, start: int, stop: int) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, stop - start)
        return read(self, key, start, stop)

    monkeypatch.setattr(_SafetensorsFiles, "rows", rows)
    pieces = convert_checkpoint(path, counts=counts(), ratio=6)
    assert largest == 40  # 320 elements of dimension 8
    assert pieces.plan.tables == whole.plan.tables
    for name in SHAPES:
        torch.testing.assert_close(packed_rows(pieces, name), packed_rows(whole, name), rtol=1e-5, atol=1e-6)


def test_weighted_tables_are_a_collection_of_their_own(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    tables = [CheckpointTable(config, weighted=config.name == "t_item") for config in configs()]
    path = write(state, "safetensors", tmp_path)
    found = convert_checkpoint(path, tables, counts(), ratio=6)
    assert {c.is_weighted(): len(c.embedding_bag_configs()) for c in found.collections()} == {False: 2, True: 1}
    fp32 = sum(4 * r * d for r, d in SHAPES.values())
    assert 0.95 * fp32 / 6 < sum(c.size_report().total for c in found.collections()) <= fp32 / 6
    mpe.save(found.model, tmp_path / "artifact", plan=found.plan)
    loaded = mpe.load(tmp_path / "artifact")
    for config in configs():
        reread = Conversion(loaded, found.plan, found.errors)
        assert torch.equal(packed_rows(reread, config.name), packed_rows(found, config.name))


def test_plain_embedding_bags(tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = torch.nn.ModuleDict({"user": torch.nn.EmbeddingBag(50, 6), "over": torch.nn.Linear(6, 1)})
    config = EmbeddingBagConfig(name="user", num_embeddings=50, embedding_dim=6, feature_names=["u"])
    found = convert_checkpoint(write(plain.state_dict(), "torch", tmp_path), [CheckpointTable(config)], max_error=0.02)
    rows = plain["user"].weight.detach()
    relative = float((packed_rows(found, "user") - rows).norm() / rows.norm())
    assert relative == pytest.approx(found.errors["user"].relative_rms)
    assert relative <= 0.02
    assert found.errors["user"].weighted_relative_rms == found.errors["user"].relative_rms


def test_wrongly_packed_rows_are_noticed(
    state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchrec_mpe.inference.convert import convert

    pack = convert.pack_tables

    def damaged(tables: list[object]) -> object:
        packed = pack(tables)  # type: ignore[arg-type]
        packed.weights[3] ^= 1
        return packed

    monkeypatch.setattr(convert, "pack_tables", damaged)
    with pytest.raises(RuntimeError, match="table t_user: packed rows read back differ by"):
        convert_checkpoint(write(state, "torch", tmp_path), counts=counts(), ratio=6)


def test_mistakes(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = write(state, "torch", tmp_path)
    with pytest.raises(KeyError, match="no counts for table t_tag"):
        convert_checkpoint(path, counts={n: c for n, c in counts().items() if n != "t_tag"}, ratio=6)
    with pytest.raises(ValueError, match="table t_user has 400 rows, its counts 3"):
        convert_checkpoint(path, counts={**counts(), "t_user": torch.ones(3, dtype=torch.int64)}, ratio=6)
    with pytest.raises(ValueError, match="cannot be met: without any bits the tables take"):
        convert_checkpoint(path, counts=counts(), ratio=60)


def test_rows_whose_squares_overflow_are_refused(tmp_path: Path) -> None:
    rows = torch.ones(40, 8)
    rows[7, 3] = -1e38
    path = write({"embedding_bags.t.weight": rows}, "torch", tmp_path)
    with pytest.raises(ValueError, match=r"table t: rows 0 to 39 hold values as large as 1\.0e\+38"):
        convert_checkpoint(path, ratio=6)
    rows[7, 3] = 1e16
    found = convert_checkpoint(write({"embedding_bags.t.weight": rows}, "torch", tmp_path), ratio=3)
    assert found.errors["t"].relative_rms is not None and found.errors["t"].relative_rms < 0.1


def test_an_outlier_that_takes_all_bits_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = torch.randn(400, 8)
    assert convert_checkpoint(write({"embedding_bags.t.weight": rows}, "torch", tmp_path), ratio=8).errors["t"].outlier is None  # fmt: skip  # noqa: E501
    rows[17] = 1e6
    found = convert_checkpoint(write({"embedding_bags.t.weight": rows}, "torch", tmp_path), ratio=8).errors["t"]
    assert found.outlier == 17 and 1e5 < found.outlier_size < 1e7
