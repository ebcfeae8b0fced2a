"""A trained model's copy with coded tables."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from torchrec_mpe.inference.compress import code_collections as module
from torchrec_mpe.inference.compress.compress import compress
from torchrec_mpe.packing.packed_tables import PackedTables

UNSEEN = 40  # the last rows of "users"
FP32_BYTES = 4 * (2000 * 16 + 900 * 8 + 300 * 40)


def tables(mean: bool = False) -> list[EmbeddingBagConfig]:
    shapes = (("users", 2000, 16, ["u"]), ("goods", 900, 8, ["i", "j"]), ("sites", 300, 40, ["s"]))
    return [
        EmbeddingBagConfig(
            name=n,
            num_embeddings=r,
            embedding_dim=d,
            feature_names=f,
            pooling=PoolingType.MEAN if mean and n == "goods" else PoolingType.SUM,
        )
        for n, r, d, f in shapes
    ]


class Model(nn.Module):
    """Two collections, the second with the last table, and a dense network."""

    def __init__(self, kind: type[EmbeddingBagCollection] = EmbeddingBagCollection, **options: Any) -> None:
        super().__init__()
        configs = tables(options.pop("mean", False))
        self.first = kind(tables=configs[:2], **options)
        self.second = kind(tables=configs[2:], **options)
        self.over = nn.Sequential(nn.BatchNorm1d(16 + 2 * 8 + 40), nn.Linear(72, 1))
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for collection, of in ((self.first, configs[:2]), (self.second, configs[2:])):
                for t in of:  # rows of nearly low rank that grew with their counts
                    directions = torch.randn(t.embedding_dim, t.embedding_dim, generator=g)
                    directions *= 0.6 ** torch.arange(t.embedding_dim).unsqueeze(1)
                    rows = torch.randn(t.num_embeddings, t.embedding_dim, generator=g) @ directions
                    rows *= counts()[t.name].sqrt().clamp(min=0.5).unsqueeze(1) * 0.05
                    collection.embedding_bags[t.name].weight.copy_(rows + 0.1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        pooled = torch.cat([self.first(features).values(), self.second(features).values()], 1)
        logits: Tensor = self.over(pooled)
        return logits


def counts() -> dict[str, Tensor]:
    """Zipf, in the order of the ids."""
    found = {t.name: (4 * t.num_embeddings / (1 + torch.arange(t.num_embeddings))).long() for t in tables()}
    found["users"][-UNSEEN:] = 0
    return found


def curvature() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    factors = {t.name: torch.randn(t.embedding_dim, t.embedding_dim, generator=g).double() for t in tables()}
    return {name: f.T @ (f * 0.8 ** torch.arange(len(f)).unsqueeze(1)) for name, f in factors.items()}


def features(weighted: bool = False) -> KeyedJaggedTensor:
    g = torch.Generator().manual_seed(2)
    sizes, lengths = (2000, 900, 900, 300), torch.randint(0, 4, (4, 8), generator=g)
    ids = [torch.randint(rows, (int(n.sum()),), generator=g) for rows, n in zip(sizes, lengths, strict=True)]
    weights = torch.rand(int(lengths.sum()), generator=g) if weighted else None
    return KeyedJaggedTensor.from_lengths_sync(["u", "i", "j", "s"], torch.cat(ids), lengths.flatten(), weights)


def lookup(model: Any, table: str, ids: Tensor) -> Tensor:
    """Rows as they are read, [n, D]."""
    ebc = model.second if table == "sites" else model.first
    feature = {"users": "u", "goods": "i", "sites": "s"}[table]
    names = ["s"] if table == "sites" else ["u", "i", "j"]
    lengths = torch.cat([torch.full((len(ids),), int(name == feature)) for name in names])
    rows: Tensor = ebc(KeyedJaggedTensor.from_lengths_sync(names, ids, lengths))[feature]
    return rows


def size(model: Any) -> int:
    total: int = model.first.size_report().total + model.second.size_report().total
    return total


def weighted_error(coded: Any, trained: Any) -> float:
    """What the coding minimizes, summed over all rows."""
    total = 0.0
    for t in tables():
        ids = torch.arange(t.num_embeddings)
        error = (lookup(coded, t.name, ids) - lookup(trained, t.name, ids)).double().detach()
        of_row = ((error @ curvature()[t.name]) * error).sum(1)
        total += float((of_row * (counts()[t.name] - 0.5).clamp(min=0)).sum())
    return total


def test_more_bytes_less_error_and_all_of_them_are_used() -> None:
    trained, errors = Model(), []
    for ratio in (60, 20, 8):
        coded: Any = compress(trained, counts(), curvature(), ratio=ratio)
        assert not coded.training
        assert 0.99 * FP32_BYTES / ratio - 64 <= size(coded) <= FP32_BYTES / ratio  # a second collection's alignment
        errors.append(weighted_error(coded, trained))
    assert errors[2] < 0.5 * errors[1] and errors[1] < 0.5 * errors[0], errors
    by_bytes: Any = compress(trained, counts(), curvature(), bytes=10_000)
    assert 9_836 <= size(by_bytes) <= 10_000


def test_curvature_is_the_metric() -> None:
    trained = Model()
    measured, identity = (compress(trained, counts(), c, ratio=30) for c in (curvature(), None))
    assert weighted_error(measured, trained) < 0.9 * weighted_error(identity, trained)


@pytest.mark.parametrize("kind", [EmbeddingBagCollection, mpe.MPEEmbeddingBagCollection])
def test_the_trained_model_stays_and_the_copy_says_nearly_the_same(kind: type[EmbeddingBagCollection]) -> None:
    trained = Model(kind).train()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    coded: Any = compress(trained, counts(), curvature(), ratio=6)
    assert all(part.training for part in trained.modules())
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert isinstance(coded.first, mpe.PackedEmbeddingBagCollection)
    out, want = coded.first(features()), trained.first(features())
    assert out.keys() == want.keys() and out.length_per_key() == want.length_per_key()
    torch.testing.assert_close(out.values(), want.values(), rtol=0, atol=0.1)
    with torch.no_grad():
        coded.over[1].weight.zero_()
    assert trained.over[1].weight.any() and coded.over[1].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_types(dtype: torch.dtype) -> None:
    wide, narrow = (compress(Model(), counts(), ratio=20, output_dtype=d) for d in (torch.float32, dtype))
    out = narrow.first(features()).values()  # type: ignore[operator, union-attr]
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wide.first(features()).values(), rtol=1e-2, atol=1e-2)  # type: ignore[operator, union-attr]


@pytest.mark.supports("apply_update of coded tables", "CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_can_be_updated_as_they_were_coded(dtype: torch.dtype, tmp_path: Path) -> None:
    trained, other = Model(), Model()
    with torch.no_grad():
        for parameter in other.first.parameters():
            parameter.copy_(parameter.flip(0))
    coded: Any = compress(trained, counts(), curvature(), ratio=20, output_dtype=dtype)
    before, size_before = coded.first.packed_tables().weights.clone(), size(coded)

    def rows_of(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        bags = model.first.embedding_bags
        return {n: (torch.arange(len(bags[n].weight)), bags[n].weight.detach()) for n in ("users", "goods")}

    updated = coded.first.apply_update(rows_of(other))
    assert all(rows.written > 0 for rows in updated.values())
    assert not torch.equal(coded.first.packed_tables().weights, before)
    mpe.save_delta(tmp_path / "delta", rows_of(trained))
    assert coded.first.apply_update(mpe.load_delta(tmp_path / "delta")) == updated
    assert torch.equal(coded.first.packed_tables().weights, before) and size(coded) == size_before
    for mmap in (False, True):
        mpe.save(coded.first, tmp_path / f"artifact-{mmap}")
        loaded: Any = mpe.load(tmp_path / f"artifact-{mmap}", mmap=mmap)
        assert loaded.apply_update(rows_of(other)) == updated
        assert not torch.equal(loaded.packed_tables().weights, before)
    mpe.save(coded.first, tmp_path / "smaller", encoders=False)
    loaded = mpe.load(tmp_path / "smaller")
    with pytest.raises(ValueError, match="table users is transform-coded and its encoder is not here: update the coll"):
        loaded.apply_update(rows_of(trained))
    loaded.encoders = coded.first.encoders
    assert loaded.apply_update(rows_of(trained)) == updated


def test_ids_without_lookups() -> None:
    trained = Model()
    ids = torch.arange(2000 - UNSEEN, 2000)
    by_mean, by_model = (compress(trained, counts(), ratio=20, unseen=u) for u in ("mean", "model"))  # type: ignore[arg-type]
    weight = trained.first.embedding_bags["users"].weight.detach()
    own = weight[ids].mean(0).expand(UNSEEN, -1)
    p = (counts()["users"] - 0.5).clamp(min=0)
    mean = (p[:, None] * weight).sum(0) / p.sum()
    torch.testing.assert_close(lookup(by_mean, "users", ids), mean.expand(UNSEEN, -1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lookup(by_model, "users", ids), own, rtol=1e-5, atol=1e-6)
    seen = torch.arange(2000 - UNSEEN)
    torch.testing.assert_close(lookup(by_mean, "users", seen), lookup(by_model, "users", seen), rtol=0, atol=0)
    for better, expected in (((0.5, 0.6), by_model), ((0.6, 0.5), by_mean), ((0.5, 0.5), by_mean)):
        given = list(better)

        def score(candidate: nn.Module, given: list[float] = given) -> float:
            assert not candidate.training
            return given.pop(0)

        chosen = compress(trained, counts(), ratio=20, score=score)
        assert not given
        torch.testing.assert_close(lookup(chosen, "users", ids), lookup(expected, "users", ids))


def test_scores_decide_nothing_where_rows_with_lookups_have_no_bits_either() -> None:
    """A table without components, all of whose rows read one vector: it stays their mean."""
    trained = Model()
    smallest = compress(trained, counts(), bytes=2000, max_components=0, score=lambda candidate: pytest.fail())
    read = lookup(smallest, "users", torch.tensor([1500, 1999]))
    torch.testing.assert_close(read[0], read[1], rtol=0, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_means_and_weights_need_squared_weights(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Model(is_weighted=weighted, mean=not weighted)
    with pytest.raises(
        ValueError, match=r"table (goods|users) is looked up with .*its counts must be a FrequencyCounter"
    ):
        compress(trained, counts(), ratio=20)
    counter = mpe.count_frequencies([features(weighted)], trained)
    found: dict[str, Any] = {}
    code_tables = module.code_tables

    def remember(coded: Any, *arguments: Any, **options: Any) -> Any:
        found.update({table.name: table for table in coded})
        return code_tables(coded, *arguments, **options)

    monkeypatch.setattr(module, "code_tables", remember)
    compress(trained, counter, ratio=5)
    for name in ("users", "goods", "sites"):
        if weighted or name == "goods":
            assert torch.equal(found[name].weights, counter.squared_weights[name])
        else:
            assert found[name].weights is None
    if not weighted:  # weights that a collection does not read do not count
        compress(Model(), mpe.count_frequencies([features(weighted=True)], Model()), ratio=5)
        assert all(table.weights is None for table in found.values())


SPOILED = {
    "a bit of a row": lambda p: p.weights[int(p.weights_offsets[0])].bitwise_xor_(1),
    "a level": lambda p: p.levels[0].mul_(1.05),
    "an element of a basis": lambda p: p.bases[0].add_(0.01),
    "no number": lambda p: p.bases[3].fill_(float("nan")),
}


@pytest.mark.parametrize("what", SPOILED)
def test_rows_that_are_read_as_something_else(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = module.pack_tables

    def wrong(tables: Any) -> PackedTables:
        packed = pack(tables)
        SPOILED[what](packed)
        return packed

    monkeypatch.setattr(module, "pack_tables", wrong)
    with pytest.raises(RuntimeError, match=r"table users: the lookup reads row \d+ as something else"):
        compress(Model(), counts(), curvature(), ratio=20)


def test_what_cannot_be_compressed() -> None:
    trained = Model()
    with pytest.raises(ValueError, match="Linear holds no EmbeddingBagCollection"):
        compress(nn.Linear(1, 1), counts(), ratio=20)
    for options in ({}, {"ratio": 20, "bytes": 10_000}):
        with pytest.raises(ValueError, match="give one of ratio and bytes"):
            compress(trained, counts(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the ratio must be above 1, got 1"):
        compress(trained, counts(), ratio=1)
    with pytest.raises(ValueError, match=r"a budget of 300 bytes cannot be met: .* the tables take [\d,]+ bytes"):
        compress(trained, counts(), bytes=300)
    with pytest.raises(KeyError, match="no counts for table sites"):
        compress(trained, {name: c for name, c in counts().items() if name != "sites"}, ratio=20)
    with pytest.raises(ValueError, match="table goods has 900 rows, its counts 2000"):
        compress(trained, {**counts(), "goods": counts()["users"]}, ratio=20)
    with pytest.raises(ValueError, match=r"table goods: its curvature must be float64 \[8, 8\]"):
        compress(trained, counts(), {**curvature(), "goods": curvature()["users"]}, ratio=20)
    with pytest.raises(KeyError, match="no curvature for table sites; measured tables: users, goods"):
        compress(trained, counts(), mpe.Curvature({n: curvature()[n] for n in ("users", "goods")}), ratio=20)
    with torch.no_grad():
        trained.first.embedding_bags["goods"].weight[77, 3] = float("nan")
    with pytest.raises(ValueError, match="table goods: row 77 holds NaN or infinite values"):
        compress(trained, counts(), ratio=20)
    searched = mpe.MPEEmbeddingBagCollection(tables())
    mpe.prepare_search_(searched, counts())
    with pytest.raises(ValueError, match="tables users, goods, sites are in the search phase: compress takes rows"):
        compress(searched, counts(), ratio=20)
