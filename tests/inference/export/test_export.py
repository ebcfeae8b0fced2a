"""Exported programs equal the model, in this process and in one that lacks the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.inference.export.export_models import KEYS, SIZES, arguments, batch, dlrm, on_fbgemm
from tests.inference.models import kjt, retrained
from torchrec_mpe.ops import library

HOST = Path(__file__).with_name("fresh_host.py")


def expectations(model: nn.Module, dtype: torch.dtype, weighted: bool) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Flat inputs and what the eager model returns for them."""
    inputs = [batch(size, dtype, weighted, most) for size, most in SIZES]
    with torch.no_grad():
        return [(flat, model(*arguments(flat))) for flat in inputs]


@pytest.mark.supports('export(form="program"), packed and fbgemm', "CPU")
@pytest.mark.parametrize("backend", ["packed", "fbgemm"])
@pytest.mark.parametrize("coded", [False, True])
def test_programs_in_a_fresh_process(coded: bool, backend: str, tmp_path: Path) -> None:
    cases = []
    for weights, dtype, weighted in (("inside", torch.int32, True), ("beside", torch.int64, False)):
        model = dlrm(weighted, coded=coded)
        package = tmp_path / f"{weights}.pt2"
        mpe.export(
            model, arguments(batch(4, dtype, weighted)), package, form="program", backend=backend, weights=weights
        )
        expected = expectations(on_fbgemm(model) if backend == "fbgemm" else model, dtype, weighted)
        torch.save(expected, tmp_path / f"{weights}.expected")
        cases.append((str(package), "program", str(tmp_path / f"{weights}.expected")))
        loaded = mpe.load_exported(package, verify=True)
        for flat, want in expected:
            torch.testing.assert_close(loaded(*flat), want, rtol=1e-6, atol=1e-6)
            # Rounding the step sizes to float16 changes what a row is by 2**-11 of it at most; INT8, by a 510th of
            # its range.
            tolerance = {"rtol": 1e-1, "atol": 2e-2} if coded else {"rtol": 1e-2, "atol": 1e-3}
            torch.testing.assert_close(loaded(*flat), model(*arguments(flat)), **tolerance)
    host = subprocess.run(
        [sys.executable, str(HOST), "fbgemm" if backend == "fbgemm" else str(library.LIBRARY), json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert host.returncode == 0, host.stderr
    assert host.stdout.count("equal") == 2


def test_only_stock_operators_on_fbgemm(tmp_path: Path) -> None:
    mpe.export(dlrm(), arguments(batch(4)), tmp_path / "m.pt2", form="program", backend="fbgemm")
    program = torch.export.load(tmp_path / "m.pt2")
    operators = [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert {operator.namespace for operator in operators} == {"aten", "fbgemm"}
    assert mpe.load_exported(tmp_path / "m.pt2").metadata["libraries"] == "fbgemm"


def test_features_in_any_order_and_a_keyed_tensor(tmp_path: Path) -> None:
    """f2 is read by two tables; the batch has another order, and a feature that nobody reads."""
    collection = mpe.emit_inference_model(retrained())
    mpe.export(collection, kjt(), tmp_path / "m.pt2", form="program")
    loaded = mpe.load_exported(tmp_path / "m.pt2")
    assert loaded.metadata["features.features"].splitlines() == ["f1", "f2", "f3", "f2"]
    want = collection(kjt())
    assert loaded.metadata["columns.output"].splitlines() == [
        f"{length} {key}" for length, key in zip(want.length_per_key(), want.keys(), strict=True)
    ]
    torch.testing.assert_close(loaded(kjt()), want.values(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["packed", "fbgemm"])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_ids_that_are_no_rows(backend: str, mode: int, tmp_path: Path) -> None:
    model = dlrm(bounds_check_mode=mode)
    mpe.export(model, arguments(batch(4)), tmp_path / "m.pt2", form="program", backend=backend)
    loaded = mpe.load_exported(tmp_path / "m.pt2")
    dense, ids, offsets = batch(4)
    bad, zero = ids.clone(), ids.clone()
    bad[0], zero[0] = 1000, 0
    if mode == 0:
        with pytest.raises((IndexError, RuntimeError), match=r"1000 is not in|not a row of its table"):
            loaded(dense, bad, offsets)
    else:
        torch.testing.assert_close(loaded(dense, bad, offsets), loaded(dense, zero, offsets), rtol=0, atol=0)
    if backend == "fbgemm" and mode == 0:
        disordered = offsets.clone()
        disordered[1] = len(ids)
        with pytest.raises(RuntimeError, match="offsets must go from 0"):
            loaded(dense, ids, disordered)


def test_weights_that_do_not_fit_the_package(tmp_path: Path) -> None:
    package = tmp_path / "m.pt2"
    mpe.export(dlrm(), arguments(batch(4)), package, form="program", weights="beside")
    (weights,) = tmp_path.glob("m-*.weights")
    good = weights.read_bytes()
    weights.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(ValueError, match=r"m-.*weights is damaged"):
        mpe.load_exported(package, verify=True)
    weights.write_bytes(good[:-64])
    with pytest.raises(ValueError, match=rf"has {len(good) - 64} bytes, .* was exported with {len(good)}"):
        mpe.load_exported(package)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        mpe.load_exported(package)
    with pytest.raises(RuntimeError, match="meta"):  # a host that forgot the weights
        torch.export.load(package).module()(*batch(4))


def test_what_is_handed_over_is_checked(tmp_path: Path) -> None:
    mpe.export(dlrm(weighted=True), arguments(batch(4, weighted=True)), tmp_path / "m.pt2", form="program")
    loaded = mpe.load_exported(tmp_path / "m.pt2")
    dense, ids, offsets, weights = batch(4, weighted=True)
    with pytest.raises(TypeError, match=r"sparse_features.values must be int64 .* got torch.int32"):
        loaded(dense, ids.int(), offsets, weights)
    with pytest.raises(TypeError, match=r"dense_features must be float32 with 2 dimensions, got torch\.float32 with 1"):
        loaded(dense[0], ids, offsets, weights)
    with pytest.raises(ValueError, match="3 tensors were given"):
        loaded(dense, ids, offsets)
    with pytest.raises(ValueError, match="1 arguments were given"):
        loaded(KeyedJaggedTensor(KEYS, ids, weights, offsets=offsets))
    with pytest.raises(ValueError, match="sparse_features must carry per-sample weights"):
        loaded(dense, KeyedJaggedTensor(KEYS, ids, offsets=offsets))
    with pytest.raises(KeyError, match="sparse_features lacks the features f2"):
        loaded(dense, KeyedJaggedTensor(KEYS[:2], ids[:1], weights[:1], offsets=offsets[:9].clamp(max=1)))


def test_what_is_no_exported_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no exported model"):
        mpe.load_exported(tmp_path / "m.pt2")
    (tmp_path / "m.pt2").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"m\.pt2 is no exported model"):
        mpe.load_exported(tmp_path / "m.pt2")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "m.pt2")
    with pytest.raises(ValueError, match=r"was not written by torchrec_mpe.export"):
        mpe.load_exported(tmp_path / "m.pt2")


def test_misuse(tmp_path: Path) -> None:
    model, example, path = dlrm(), arguments(batch(4)), tmp_path / "m.pt2"
    with pytest.raises(ValueError, match="form must be aoti or program, got onnx"):
        mpe.export(model, example, path, form="onnx")
    with pytest.raises(ValueError, match=r"must end in \.pt2"):
        mpe.export(model, example, tmp_path / "m.bin")
    with pytest.raises(ValueError, match="holds 1"):
        mpe.export(model, arguments(batch(1)), path)
    with pytest.raises(ValueError, match="stores FBGEMM's rows"):
        mpe.export(on_fbgemm(model), example, path)
    with pytest.raises(ValueError, match="no KeyedJaggedTensor"):
        mpe.export(model, example[0], path)
    with pytest.raises(TypeError, match="sparse_features must be a tensor or a KeyedJaggedTensor, got str"):
        mpe.export(model, (example[0], "ids"), path)
    with pytest.raises(ValueError, match="DLRM is in training mode"):
        mpe.export(dlrm().train(), example, path)
    with pytest.raises(ValueError, match="Linear holds no PackedEmbeddingBagCollection"):
        mpe.export(nn.Linear(1, 1).eval(), example, path)
    assert not list(tmp_path.iterdir())


class TracedDifferently(nn.Module):
    """A model whose program is not what it computes."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        pooled: Tensor = self.collection(features).values()
        return pooled + 1 if torch.compiler.is_exporting() else pooled


class OtherFeatures(TracedDifferently):
    """Looks up the same features in another order, too."""

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        pooled: Tensor = self.collection(features.permute([2, 0, 1])).values()
        return pooled


def test_a_wrong_export_leaves_nothing(tmp_path: Path) -> None:
    collection = dlrm().sparse_arch.embedding_bag_collection
    sparse = arguments(batch(4))[1]
    for weights in ("inside", "beside"):
        with pytest.raises(RuntimeError, match="the exported model differs from TracedDifferently"):
            mpe.export(
                TracedDifferently(collection).eval(), sparse, tmp_path / "m.pt2", form="program", weights=weights
            )
    with pytest.raises(ValueError, match="cannot trace OtherFeatures for every batch"):
        mpe.export(OtherFeatures(collection).eval(), sparse, tmp_path / "m.pt2", form="program")
    assert not list(tmp_path.iterdir())


def test_an_export_replaces_another(tmp_path: Path) -> None:
    """The earlier weights stay: a process may be about to map them."""
    other = dlrm()
    with torch.no_grad():
        other.over_arch.model[-1].bias += 1
    for model in (dlrm(), other):
        mpe.export(model, arguments(batch(4)), tmp_path / "m.pt2", form="program", weights="beside")
        loaded = mpe.load_exported(tmp_path / "m.pt2")
        torch.testing.assert_close(loaded(*batch(4)), model(*arguments(batch(4))), rtol=1e-6, atol=1e-6)
    assert len(list(tmp_path.glob("m-*.weights"))) == 2
    assert len(list(tmp_path.iterdir())) == 3
