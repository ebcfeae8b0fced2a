"""The curvature of the loss in pooled embeddings, against finite differences."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

import torchrec_mpe as mpe
from tests.inference.compress.models import KEYS, Click, Loss, arguments, batch, click, tables
from torchrec_mpe.inference.compress.curvature import measure_curvature

BATCHES = [batch(0), batch(1, size=3)]
TABLE_OF = {"a": "t1", "b@t1": "t1", "b@t2": "t2", "c": "t3"}


def logistic(outputs: Tensor, of: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, of.labels[:, None].expand_as(outputs), reduction="none")


def squared(outputs: Tensor, of: Any) -> Tensor:
    return ((outputs - of.labels[:, None]) ** 2).sum(1)


def softmax(outputs: Tensor, of: Any) -> Tensor:
    """The Hessian in the outputs is not diagonal."""
    return F.cross_entropy(outputs, of.labels.long(), reduction="sum")


def shifted_outputs(model: Click, of: Any, key: str, shift: Tensor) -> Tensor:
    """What the model says when ``shift`` [D] is added to the pooled embeddings of one feature."""

    def add(module: nn.Module, arguments: Any, pooled: KeyedTensor) -> KeyedTensor:
        parts = {name: part + shift if name == key else part for name, part in pooled.to_dict().items()}
        return KeyedTensor.from_tensor_list(list(parts), list(parts.values()))

    hook = model.ebc.register_forward_hook(add)
    with torch.no_grad():
        outputs: Tensor = model(*arguments(of))
    hook.remove()
    return outputs


def second_differences(model: Click, loss: Loss, key: str) -> Tensor:
    """Of the mean loss of all batches in the pooled embedding of one feature, [D, D]."""
    step = 1e-3
    dim = KEYS[key]
    unit = step * torch.eye(dim, dtype=torch.float64)
    examples = sum(len(of.labels) for of in BATCHES)

    def at(shift: Tensor) -> float:
        return sum(float(loss(shifted_outputs(model, of, key, shift), of).sum()) for of in BATCHES) / examples

    return torch.tensor(
        [
            [
                (at(unit[i] + unit[j]) - at(unit[i] - unit[j]) - at(unit[j] - unit[i]) + at(-unit[i] - unit[j]))
                / (4 * step**2)
                for j in range(dim)
            ]
            for i in range(dim)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize(
    ("heads", "loss", "given"),
    [(1, logistic, None), (2, logistic, None), (1, squared, squared), (2, softmax, softmax), (2, logistic, logistic)],
)
def test_is_the_hessian_of_a_network_that_is_linear_in_the_embeddings(
    heads: int, loss: Loss, given: Loss | None
) -> None:
    model = click(heads, linear=True)
    curvature = measure_curvature(model, BATCHES, loss=given)
    want = {name: torch.zeros_like(matrix) for name, matrix in curvature.items()}
    for key, table in TABLE_OF.items():
        want[table] += second_differences(model, loss, key)
    assert list(curvature) == ["t1", "t2", "t3"]
    for table, matrix in curvature.items():
        torch.testing.assert_close(matrix, want[table], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [None, squared])
def test_leaves_out_the_curvature_of_the_network(loss: Loss | None) -> None:
    """J by differences of the outputs, example by example; H of each by hand."""
    model, step = click(heads=2), 1e-4
    curvature = measure_curvature(model, BATCHES, loss=loss)
    want = {name: torch.zeros_like(matrix) for name, matrix in curvature.items()}
    for key, table in TABLE_OF.items():
        unit = step * torch.eye(KEYS[key], dtype=torch.float64)
        for of in BATCHES:
            columns = [
                (shifted_outputs(model, of, key, u) - shifted_outputs(model, of, key, -u)) / (2 * step) for u in unit
            ]
            j = torch.stack(columns, dim=2)  # [B, heads, D]
            p = model(*arguments(of)).sigmoid()
            h = p * (1 - p) if loss is None else torch.full_like(p, 2)
            want[table] += torch.einsum("bmd,bm,bme->de", j, h, j).detach() / 9
    for table, matrix in curvature.items():
        torch.testing.assert_close(matrix, want[table], rtol=1e-5, atol=1e-7)


def test_negative_curvature_in_the_outputs_counts_as_none() -> None:
    model = click(heads=2, linear=True)
    one = measure_curvature(model, BATCHES, loss=lambda outputs, of: outputs[:, 0] ** 2)
    both = measure_curvature(model, BATCHES, loss=lambda outputs, of: outputs[:, 0] ** 2 - outputs[:, 1] ** 2)
    for table in one:
        torch.testing.assert_close(both[table], one[table])


def test_leaves_the_model_as_it_is() -> None:
    model = click()
    model.network.train()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_curvature(model, BATCHES)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert model(*arguments(batch(0))).requires_grad
    assert model.ebc(batch(0).sparse_features).values().grad_fn is not None  # no hook is left


def test_takes_so_many_batches() -> None:
    model, batches = click(), iter([*BATCHES, batch(2)])
    found = measure_curvature(model, batches, num_batches=2)
    assert next(batches).labels.tolist() == batch(2).labels.tolist()
    for table, matrix in measure_curvature(model, BATCHES).items():
        torch.testing.assert_close(found[table], matrix)


def test_forward_of_the_user() -> None:
    model = click()
    want = measure_curvature(model, BATCHES)
    found = measure_curvature(
        model,
        [(of.labels, arguments(of)) for of in BATCHES],
        forward=lambda network, of: network(*of[1]).squeeze(1),
    )
    for table, matrix in want.items():
        torch.testing.assert_close(found[table], matrix)


class Silent(Click):
    """Reads no embedding of t2, and that of c without a gradient."""

    def forward(self, dense_features: Tensor, sparse_features: Any) -> Tensor:
        pooled = self.ebc(sparse_features)
        read = [pooled["a"], pooled["b@t1"], 0 * pooled["b@t2"], pooled["c"].detach()]
        logits: Tensor = self.network(torch.cat([dense_features, *read], dim=1))
        return logits


def test_what_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="no gradient reaches tables t2, t3: the model's outputs do not depend"):
        measure_curvature(Silent(linear=True).double(), BATCHES)
    with pytest.raises(ValueError, match="there are no batches to measure on"):
        measure_curvature(click(), iter([]))
    with pytest.raises(ValueError, match="the loss does not curve in the model's outputs"):
        measure_curvature(click(), BATCHES, loss=lambda outputs, of: outputs.abs())
    with pytest.raises(ValueError, match=r"give forward, a function of \(model, batch\)"):
        measure_curvature(click(), BATCHES, forward=lambda model, of: (model(*arguments(of)),))
    with pytest.raises(ValueError, match="Linear holds no EmbeddingBagCollection"):
        measure_curvature(nn.Linear(1, 1), BATCHES)
    broken = click(heads=2)
    with torch.no_grad():
        broken.ebc.embedding_bags["t2"].weight.fill_(float("nan"))
    for loss in (None, softmax):
        with pytest.raises(ValueError, match="the curvature of tables t1, t2, t3 is not finite"):
            measure_curvature(broken, BATCHES, loss=loss)


def test_save_and_load(tmp_path: Path) -> None:
    curvature = measure_curvature(click(), BATCHES)
    curvature.save(tmp_path / "curvature.safetensors")
    loaded = type(curvature).load(tmp_path / "curvature.safetensors")
    assert {t: m.tolist() for t, m in loaded.items()} == {t: m.tolist() for t, m in curvature.items()}
    with pytest.raises(KeyError, match="no curvature for table t9; measured tables: t1, t2, t3"):
        loaded["t9"]
    save_file({"t1": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a curvature file"):
        type(curvature).load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("phase", ["plain", "search"])
def test_collections_of_both_kinds(phase: str) -> None:
    """Ours, in every phase, as TorchRec's."""
    torch.manual_seed(0)
    model = Click(collection=mpe.MPEEmbeddingBagCollection(tables()))
    if phase == "search":
        counts = {t.name: torch.ones(t.num_embeddings, dtype=torch.int64) for t in tables()}
        mpe.prepare_search_(model, counts)
    model.double()
    plain = Click(collection=EmbeddingBagCollection(tables=tables())).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    if phase == "plain":
        for table, matrix in measure_curvature(plain, BATCHES).items():
            torch.testing.assert_close(measure_curvature(model, BATCHES)[table], matrix)
    else:
        assert all(matrix.any() for matrix in measure_curvature(model, BATCHES).values())
