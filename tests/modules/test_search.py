"""Penalty and sampling by hand."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

import torchrec_mpe as mpe
from torchrec_mpe.modules.sampling import sample_bits

TABLES = [
    EmbeddingBagConfig(name="a", num_embeddings=4, embedding_dim=4, feature_names=["a"]),
    EmbeddingBagConfig(name="b", num_embeddings=2, embedding_dim=8, feature_names=["b"]),
]
COUNTS = {"a": torch.tensor([9, 4, 2, 1]), "b": torch.tensor([8, 3])}


def model(kind: Literal["bits", "paper"], weight: float = 2.0) -> mpe.MPEEmbeddingBagCollection:
    """Two groups a table of its own dimension, candidates 0, 2 and 4 bits, temperature 1."""
    collection = mpe.MPEEmbeddingBagCollection(TABLES)
    config = mpe.SearchConfig((0, 2, 4), num_groups=2, penalty=kind, penalty_weight=weight, temperature=1.0)
    mpe.prepare_search_(collection, COUNTS, config)
    with torch.no_grad():
        # Expected bits: a's groups 1 + 2 = 3 (p = 0, 1/2, 1/2) and 2 (uniform); b's 0 and 4.
        collection.mpe["dim_4"].gamma.copy_(torch.tensor([[-100.0, 0, 0], [0, 0, 0]]))
        collection.mpe["dim_8"].gamma.copy_(torch.tensor([[0.0, -100, -100], [-100, -100, 0]]))
    return collection


def test_exact_bits_penalty() -> None:
    """a: 1 row at 3 bits and 3 at 2, 4 elements each; b: 1 row at 0 and 1 at 4 bits, 8 elements each."""
    expected = 2.0 * (4 * (1 * 3 + 3 * 2) + 8 * (1 * 0 + 1 * 4)) / (4 * 4 + 2 * 8)
    torch.testing.assert_close(mpe.bit_penalty(model("bits")), torch.tensor(expected))


def test_paper_penalty() -> None:
    """f of a: 9 and 7 lookups over 7, so 9/7 and 1; of b: 8 and 3 over 3."""
    expected = 2.0 * (3 / (9 / 7) + 2 / 1 + 0 / (8 / 3) + 4 / 1)
    torch.testing.assert_close(mpe.bit_penalty(model("paper")), torch.tensor(expected))


def test_penalty_lowers_bits() -> None:
    collection = model("bits")
    before = collection.mpe["dim_4"].expected_bits().detach().clone()
    mpe.bit_penalty(collection).backward()
    with torch.no_grad():
        collection.mpe["dim_4"].gamma -= collection.mpe["dim_4"].gamma.grad
    assert (collection.mpe["dim_4"].expected_bits() < before).all()


def test_penalty_needs_the_search_phase() -> None:
    with pytest.raises(ValueError, match="prepare_search_ before it is sharded"):
        mpe.bit_penalty(mpe.MPEEmbeddingBagCollection(TABLES))


class ReturnsLoss(nn.Module):
    def __init__(self, output: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.collection = model("bits")
        self.output = output

    def forward(self, loss: torch.Tensor) -> Any:
        return self.output(loss)


def test_the_penalty_is_added_to_the_loss_that_a_model_returns() -> None:
    logits, loss = torch.zeros(3), torch.tensor(0.25)
    penalty = mpe.bit_penalty(model("bits"))
    names = ReturnsLoss(lambda loss: loss).state_dict().keys()
    for returned, want in (
        (lambda loss: loss, loss + penalty),
        (lambda loss: (loss, (loss.detach(), logits)), loss + penalty),
        (lambda loss: (torch.stack([loss, loss]), logits), torch.stack([loss, loss]) + penalty / 2),
    ):
        trained = ReturnsLoss(returned)
        plain = trained(loss)
        for _ in range(2):  # once, however often it is asked for
            assert mpe.add_bit_penalty_(trained) is trained
        assert trained.state_dict().keys() == names
        for again in (trained, copy.deepcopy(trained)):
            out = again(loss)
            assert isinstance(out, tuple) == isinstance(plain, tuple)
            assert torch.equal(out[0] if isinstance(out, tuple) else out, want)
            assert not isinstance(out, tuple) or len(out) == 2
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        assert all(q.gamma.grad is not None for q in again.collection.quantizers().values())
        trained.eval()
        assert str(trained(loss)) == str(plain), "evaluation has no penalty"
        trained.train()
        mpe.prepare_retrain_(trained, mpe.sample_precision(trained))
        assert str(trained(loss)) == str(plain), "nor has retraining"
    with pytest.raises(TypeError, match="ReturnsLoss returns a dict, add_bit_penalty_ needs a loss or a tuple"):
        mpe.add_bit_penalty_(ReturnsLoss(lambda loss: {"loss": loss}))(loss)


def test_sample_bits_by_hand() -> None:
    """3 candidates: the highest with p >= 1/6."""
    p = torch.tensor([[0.1, 0.7, 0.2], [0.95, 0.04, 0.01], [1 / 6, 1 / 3, 1 / 2], [0.5, 0.4, 0.1], [0.834, 0.166, 0.0]])
    assert sample_bits(p, (0, 2, 4)).tolist() == [4, 0, 4, 2, 0]


def test_sample_precision() -> None:
    plan = mpe.sample_precision(model("bits"))
    assert plan.tables["a"].bits == (4, 4) and plan.tables["a"].bounds == (0, 1, 4)
    assert plan.tables["b"].bits == (0, 4) and plan.tables["b"].bounds == (0, 1, 2)
    assert plan.candidate_bits == (0, 2, 4)
    assert plan.provenance["method"] == "search" and plan.provenance["penalty_weight"] == 2.0


def test_unranked_ids_keep_their_widths() -> None:
    """Table a's most frequent row is row 2: it must get the width of the first group."""
    collection = mpe.MPEEmbeddingBagCollection(TABLES[:1])
    mpe.prepare_search_(collection, {"a": torch.tensor([1, 2, 9, 4])}, mpe.SearchConfig((0, 4), num_groups=2))
    with torch.no_grad():
        collection.mpe["dim_4"].gamma.copy_(torch.tensor([[-1.0, 0], [0, -1]]))
    assert mpe.sample_precision(collection).tables["a"].of_rows().tolist() == [0, 0, 4, 0]


def test_diverged_search_is_told() -> None:
    collection = model("bits")
    with torch.no_grad():
        collection.mpe["dim_4"].gamma.fill_(float("nan"))
    with pytest.raises(ValueError, match="the search diverged"):
        mpe.sample_precision(collection)


@pytest.mark.parametrize(
    "settings",
    [
        {"candidate_bits": (0, 9)},
        {"candidate_bits": ()},
        {"candidate_bits": (2, 2)},
        {"grouping": "other"},
        {"penalty": "other"},
        {"zero_row": "other"},
        {"num_groups": 0},
        {"temperature": 0.0},
        {"penalty_weight": -1.0},
        {"penalty_weight": float("nan")},
    ],
)
def test_config_refuses(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        mpe.SearchConfig(**settings)  # type: ignore[arg-type]
