"""Distillation of the dense network over coded rows."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.inference.compress.models import Click, arguments, batch, click, tables
from tests.inference.compress.packed import packed
from torchrec_mpe.inference.compress.distill import distill_, distillation_loss

BATCHES = [batch(number, size=64) for number in range(40)]


def teacher_and_coded(heads: int = 1) -> tuple[Click, Click]:
    """In float32; the coded one has the teacher's network."""
    teacher = click(heads).float()
    rows = {name: bag.weight.detach() for name, bag in teacher.ebc.embedding_bags.items()}
    coded = Click(heads, collection=packed(tables(), rows))
    coded.network.load_state_dict(teacher.network.state_dict())
    for of in BATCHES:
        of.dense_features = of.dense_features.float()
    return teacher, coded.eval()


def distance(coded: Click, teacher: Click) -> float:
    """Of their logits on batches that are not trained on."""
    with torch.no_grad():
        held = [batch(number, size=256) for number in (100, 101)]
        for of in held:
            of.dense_features = of.dense_features.float()
        return sum(float(F.mse_loss(coded(*arguments(of)).sigmoid(), teacher(*arguments(of)).sigmoid())) for of in held)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)


def test_loss_is_that_of_the_teachers_probabilities() -> None:
    logits = torch.tensor([[0.5, -1.0], [2.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, -1.0], [0.0, 3.0]], requires_grad=True)
    p, q = logits.sigmoid(), teacher.sigmoid()
    loss = distillation_loss(logits, teacher)
    torch.testing.assert_close(loss, -(q * p.log() + (1 - q) * (1 - p).log()).mean())
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(logits.grad, (p - q).detach() / 4)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_network_comes_closer_to_the_teacher(heads: int) -> None:
    teacher, coded = teacher_and_coded(heads)
    teacher.train()
    of_teacher, rows, statistics = state(teacher), state(coded.ebc), state(coded.network)
    teacher.eval()
    before = distance(coded, teacher)
    teacher.train()
    result = distill_(coded, teacher, BATCHES, learning_rate=0.02)
    assert not any(module.training for module in coded.modules()) and all(m.training for m in teacher.modules())
    assert_same(teacher, of_teacher)
    assert_same(coded.ebc, rows)
    assert distance(coded, teacher.eval()) < 0.5 * before
    assert result.steps == len(result.losses) == 40 and result.scores is None and result.kept
    assert sum(result.losses[-5:]) < sum(result.losses[:5])
    norm = coded.network.state_dict()
    assert not torch.equal(norm["1.running_mean"], statistics["1.running_mean"])  # batch norm was in train mode
    assert all(parameter.grad is None for parameter in coded.parameters())


def test_the_learning_rate_falls_to_nothing() -> None:
    """Where the gradient is always the same, each of Adam's steps is one learning rate."""
    teacher, coded = teacher_and_coded()
    before = state(coded.network)["4.bias"]
    distill_(coded, teacher, iter(BATCHES), steps=4, loss=lambda logits, wanted: -logits.mean(), learning_rate=0.1)
    torch.testing.assert_close(state(coded.network)["4.bias"] - before, torch.tensor([0.25]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("after", "kept"), [(0.9, True), (0.5, True), (0.4, False), (float("nan"), False)])
def test_a_network_whose_score_fell_is_put_back(after: float, kept: bool) -> None:
    teacher, coded = teacher_and_coded()
    before, scores = state(coded), [0.5, after]

    def score() -> float:
        assert not any(module.training for module in coded.modules())
        return scores.pop(0)

    result = distill_(coded, teacher, BATCHES[:3], score=score)
    assert result.kept is kept and result.scores is not None and result.scores[0] == 0.5
    if kept:
        assert not torch.equal(coded.network[0].weight, before["network.0.weight"])
    else:
        assert_same(coded, before)


def test_forward_and_loss_of_the_user() -> None:
    teacher, coded = teacher_and_coded()
    before = distance(coded, teacher)

    def forward(model: nn.Module, of: Any) -> Tensor:
        logits: Tensor = model(*of)
        return logits.squeeze(1)

    result = distill_(
        coded, teacher, [arguments(of) for of in BATCHES], forward=forward, loss=F.mse_loss, learning_rate=0.02
    )
    assert result.losses[-1] < result.losses[0] and distance(coded, teacher) < before


def test_what_cannot_be_distilled() -> None:
    teacher, coded = teacher_and_coded()
    before = state(coded)
    with pytest.raises(ValueError, match="batches has no length: give steps"):
        distill_(coded, teacher, iter(BATCHES))
    with pytest.raises(ValueError, match="there are no batches to distill on"):
        distill_(coded, teacher, [])
    with pytest.raises(ValueError, match="there are no batches to distill on: an iterator that was used"):
        distill_(coded, teacher, iter([]), steps=2)
    with pytest.raises(ValueError, match="Click holds no PackedEmbeddingBagCollection"):
        distill_(teacher, teacher, BATCHES)
    with pytest.raises(ValueError, match=r"the loss is not finite in step 2 of 3: the network is as it was before"):
        distill_(coded, teacher, BATCHES[:3], loss=iter_loss([1.0, float("nan"), 1.0]))
    assert_same(coded, before)
    shared = Click(collection=coded.ebc)
    shared.network = teacher.network
    with pytest.raises(ValueError, match=r"the coded model shares the parameter network\.0\.weight with its teacher"):
        distill_(shared, teacher, BATCHES)
    with pytest.raises(ValueError, match="PackedEmbeddingBagCollection has no parameter to train"):
        distill_(coded.ebc, teacher, BATCHES)


def iter_loss(factors: list[float]) -> Any:
    return lambda logits, wanted: distillation_loss(logits, wanted) * factors.pop(0)
