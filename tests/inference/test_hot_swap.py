"""Models replaced and updated while they answer: no request fails, each answer is one version's."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

import torchrec_mpe as mpe
from tests.inference.models import Model, kjt, retrained, tables
from tests.packing.random_codings import coded_table, random_coding
from tests.threads import repeat_in_threads
from torchrec_mpe.inference.artifact.save_load import load, save
from torchrec_mpe.inference.hot_swap import ServedModel
from torchrec_mpe.packing.pack import pack_tables


class EmbeddingsAndLogits(Model):
    """What the tables give, exactly, and what the dense layers make of it: BLAS rounds by where their weights lie."""

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Embeddings [B, D] and logits [B, 1]."""
        embeddings = self.sparse["ebc"](features).values()
        return embeddings, self.over(self.norm(embeddings))


def is_one(answer: tuple[Tensor, Tensor], known: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(answer[0], known[0]) and torch.allclose(answer[1], known[1], rtol=0, atol=1e-6)


def model_of(version: int) -> nn.Module:
    """The same tables with other rows and dense weights for each version."""
    trained = EmbeddingsAndLogits(retrained())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.01 * version
    return mpe.emit_inference_model(trained).eval()


@pytest.mark.parametrize("mmap", [False, True])
def test_a_model_with_coded_tables_takes_over(tmp_path: Path, mmap: bool) -> None:
    features, model, coded = kjt(), model_of(0), model_of(0)
    packed = pack_tables(
        [
            coded_table(t.name, *random_coding(k, t.num_embeddings, t.embedding_dim, 4, remap=k == 0))
            for k, t in enumerate(tables())
        ]
    )
    coded.sparse["ebc"] = mpe.PackedEmbeddingBagCollection(tables(), packed)
    want = coded(features)
    save(coded, tmp_path / "coded")
    served = ServedModel(model, probe=(features,))
    assert served.swap(load(tmp_path / "coded", EmbeddingsAndLogits(retrained()), mmap=mmap)).wait(30)
    assert is_one(served(features), want) and not is_one(model(features), want)


@pytest.mark.supports("hot swap under load, no failed request", "CPU")
def test_artifacts_are_swapped_and_updated_under_load(tmp_path: Path, stress_seconds: float) -> None:
    """Four threads ask, one swaps three artifacts in turn, one updates a row that they ask for."""
    features = kjt()
    row = {"t2": (torch.tensor([6]), torch.randn(1, 5, generator=torch.Generator().manual_seed(7)))}
    known = []
    for number in range(3):
        version = model_of(number)
        save(version, tmp_path / str(number))
        known.append(version(features))
        assert version.sparse["ebc"].apply_update(row)["t2"].written == 1
        known.append(version(features))
    assert len({tuple(embeddings.flatten().tolist()) for embeddings, _ in known}) == 6
    served = ServedModel(load(tmp_path / "0", EmbeddingsAndLogits(retrained())), probe=(features,))
    met: set[int] = set()
    answers, swaps, answered = [0], [0], threading.Event()

    def ask() -> None:
        answer = served(features)
        found = [number for number, version in enumerate(known) if is_one(answer, version)]
        assert len(found) == 1, "an answer is of no version"
        met.add(found[0])
        answers[0] += 1
        answered.set()

    def swap() -> None:
        swaps[0] += 1
        number = swaps[0] % 3
        new = load(tmp_path / str(number), EmbeddingsAndLogits(retrained()), mmap=number == 1)
        assert served.swap(new).wait(30)

    def update() -> None:
        if answered.wait(1.0):  # so that there are answers of rows before the update
            answered.clear()
            served.model.sparse["ebc"].apply_update(row)

    repeat_in_threads([ask, ask, ask, ask, swap, update], stress_seconds)
    assert swaps[0] > 3 and answers[0] > 10 and len(met) > 3, (swaps, answers, met)


def test_each_answer_is_one_versions(tmp_path: Path) -> None:
    """Without updates a whole answer is exactly one version's, and after a swap returns the new one's."""
    features = kjt()
    versions = [model_of(version) for version in range(3)]
    answers = [version(features) for version in versions]
    served = ServedModel(versions[0], probe=(features,))
    current, met, swaps = [0], set(), [0]

    def ask() -> None:
        answer = served(features)
        found = [number for number, known in enumerate(answers) if is_one(answer, known)]
        assert len(found) == 1
        met.add(found[0])

    def swap() -> None:
        number = (current[0] + 1) % 3
        served.swap(versions[number])
        current[0] = number
        swaps[0] += 1
        assert is_one(served(features), answers[number])

    repeat_in_threads([ask, ask, ask, ask, swap], 1.0)
    assert met == {0, 1, 2} and swaps[0] > 3


class Gate(nn.Module):
    """Answers its number once it may."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.began, self.may = number, threading.Event(), threading.Event()
        self.eval()

    def forward(self, probe: bool) -> Tensor:
        if not probe:
            self.began.set()
            assert self.may.wait(30)
        return torch.tensor(self.number)


def test_the_old_model_ends_its_requests_and_goes() -> None:
    old, new = Gate(1), Gate(2)
    gone, may, began = weakref.ref(old), old.may, old.began
    served = ServedModel(old, probe=(True,))
    del old
    gc.disable()  # it goes because nothing refers to it, not because somebody looks for cycles
    try:
        with ThreadPoolExecutor(1) as pool:
            in_flight = pool.submit(served, False)
            assert began.wait(30)
            let_go = served.swap(new)
            assert served.model is new and int(served(True)) == 2 and not let_go.is_set() and gone() is not None
            may.set()
            assert int(in_flight.result()) == 1
            assert let_go.wait(30) and gone() is None
        idle = served.swap(Gate(3))
        assert idle.is_set()
    finally:
        gc.enable()


class Fails(nn.Module):
    """A model whose answer is wrong, or that has none."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.eval()

    def forward(self, _: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def keyed(keys: list[str], lengths: list[int]) -> KeyedTensor:
    return KeyedTensor(keys, lengths, torch.zeros(2, sum(lengths)))


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2, 3), torch.zeros(2, 3).half()),
        (torch.zeros(2, 3), [torch.zeros(2, 3)]),
        (keyed(["a", "b"], [2, 3]), keyed(["a", "c"], [2, 3])),
        (keyed(["a", "b"], [2, 3]), keyed(["a", "b"], [3, 2])),
        (keyed(["a", "b"], [2, 3]), keyed(["b", "a"], [3, 2])),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}),
        ((torch.zeros(2), None), (torch.zeros(2), 1.0)),
    ],
)
def test_a_model_that_answers_otherwise_is_refused(answer: Any, other: Any) -> None:
    first = Fails(answer)
    served = ServedModel(first, probe=(0,))
    with pytest.raises(ValueError, match="the new model answers the probe with"):
        served.swap(Fails(other))
    with pytest.raises(RuntimeError, match="broken"):
        served.swap(Fails(RuntimeError("broken")))
    assert served.model is first and served(0) is answer
    assert served.swap(Fails(answer)).is_set() and served.model is not first


def test_a_failed_request_is_over() -> None:
    first = Fails(torch.zeros(1))
    served = ServedModel(first, probe=(0,))
    first.answer = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        served(0)
    assert served.swap(Fails(torch.ones(1))).is_set()


def test_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    served = ServedModel(model, probe=(torch.zeros(3, 2),))
    assert not served(torch.zeros(3, 2)).requires_grad
    other = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    other[1].train()
    with pytest.raises(ValueError, match=r"1 is in training mode, .*: call eval"):
        served.swap(other)
    with pytest.raises(ValueError, match="Sequential is in training mode"):
        ServedModel(other.train(), probe=(torch.zeros(3, 2),))
