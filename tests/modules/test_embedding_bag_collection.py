"""Until a phase is prepared it is TorchRec's collection; then every bag is what a plain loop gives."""

import copy
from typing import Any

import pytest
import torch
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from torchrec_mpe.modules.embedding_bag_collection import Phase
from torchrec_mpe.modules.row_quantizer import RetrainQuantizer, SearchQuantizer
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.precision.from_frequencies import uniform_precision
from torchrec_mpe.precision.row_initialization import RowInitialization


def tables(pooling: PoolingType = PoolingType.SUM) -> list[EmbeddingBagConfig]:
    """Two dimensions, one of them odd; a table of two features, and f2 read by two tables."""
    return [
        EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=d, feature_names=f, pooling=pooling)
        for n, r, d, f in (("t1", 10, 4, ["f1", "f2"]), ("t2", 7, 3, ["f3"]), ("t3", 9, 4, ["f2"]))
    ]


def kjt(dtype: torch.dtype = torch.int64, weighted: bool = False, device: str = "cpu") -> KeyedJaggedTensor:
    """f3: [6] [] ; other: [1] [1]; f1: [0, 9] [3, 3, 3]; f2: [] [8]."""
    values = torch.tensor([6, 1, 1, 0, 9, 3, 3, 3, 8], dtype=dtype, device=device)
    weights = torch.linspace(0.1, 0.9, 9, device=device) if weighted else None
    lengths = torch.tensor([1, 0, 1, 1, 2, 3, 0, 1], device=device)
    return KeyedJaggedTensor.from_lengths_sync(["f3", "other", "f1", "f2"], values, lengths, weights)


def counts() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {t.name: torch.randint(1, 99, (t.num_embeddings,), generator=g) for t in tables()}


def searching(**settings: Any) -> mpe.MPEEmbeddingBagCollection:
    model = mpe.MPEEmbeddingBagCollection(tables(settings.pop("pooling", PoolingType.SUM)), settings.pop("w", False))
    mpe.prepare_search_(model, counts(), mpe.SearchConfig(num_groups=3, temperature=1.0, **settings))
    with torch.no_grad():
        for k, (_, p) in enumerate(model.mpe.named_parameters()):
            p += 0.003 * torch.rand(p.shape, generator=torch.Generator().manual_seed(k))
    return model


# Weighted mean is left out: torch's EmbeddingBag has none, and prepared phases refuse it.
POOLING = [(PoolingType.SUM, False), (PoolingType.SUM, True), (PoolingType.MEAN, False)]


@pytest.mark.parametrize(("pooling", "weighted"), POOLING)
def test_plain_phase_is_torchrecs_collection(pooling: PoolingType, weighted: bool) -> None:
    stock = EmbeddingBagCollection(tables(pooling), is_weighted=weighted)
    ours = mpe.MPEEmbeddingBagCollection(tables(pooling), is_weighted=weighted)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    for dtype in (torch.int32, torch.int64):
        got, want = ours(kjt(dtype, weighted)), stock(kjt(dtype, weighted))
        assert got.keys() == want.keys() and got.length_per_key() == want.length_per_key()
        torch.testing.assert_close(got.values(), want.values(), rtol=0, atol=0)


def test_plain_phase_traces_and_scripts() -> None:
    model = mpe.MPEEmbeddingBagCollection(tables())
    traced = symbolic_trace(model)
    torch.testing.assert_close(traced(kjt()).values(), model(kjt()).values())
    torch.jit.script(traced)
    torch.jit.script(model)


def test_meta_device() -> None:
    model = mpe.MPEEmbeddingBagCollection(tables(), device=torch.device("meta"))
    assert model(kjt(device="meta")).values().device.type == "meta"
    with torch.device("meta"):
        assert mpe.MPEEmbeddingBagCollection(tables()).device == torch.device("meta")
    mpe.prepare_search_(model, counts(), mpe.SearchConfig())
    assert all(p.device.type == "cpu" for p in model.mpe.parameters()), "learned values must survive materialization"


def test_duplicate_table_is_refused() -> None:
    with pytest.raises(ValueError, match="Duplicate table name"):
        mpe.MPEEmbeddingBagCollection(tables()[:1] * 2)


@pytest.mark.parametrize(("pooling", "weighted"), POOLING)
@pytest.mark.parametrize("phase", ["search", "retrain"])
def test_prepared_phases_equal_a_loop(phase: str, pooling: PoolingType, weighted: bool) -> None:
    model = searching(pooling=pooling, w=weighted)
    if phase == "retrain":
        widths = {
            t.name: TableBitWidths(t.num_embeddings, t.embedding_dim, (0, 2, 5, t.num_embeddings), (6, 2, 0))
            for t in tables()
        }
        mpe.prepare_retrain_(model, mpe.PrecisionPlan(widths, tuple(range(7))))
    out, features = model(kjt(weighted=weighted)), kjt(weighted=weighted).to_dict()
    assert out.keys() == ["f1", "f2@t1", "f3", "f2@t3"]
    for key in out.keys():  # noqa: SIM118
        feature, _, named = key.partition("@")
        table = next(t for t in tables() if feature in t.feature_names and named in ("", t.name))
        quantizer = model.quantizers()[table.embedding_dim]
        bags = features[feature]
        for i in range(2):
            low, high = bags.offsets()[i], bags.offsets()[i + 1]
            expected = torch.zeros(table.embedding_dim)
            for j in range(int(low), int(high)):
                row = _row_by_hand(model, quantizer, table, int(bags.values()[j]))
                expected += row * (bags.weights()[j] if weighted else 1)
            if pooling == PoolingType.MEAN:
                expected /= max(1, int(high - low))
            torch.testing.assert_close(out[key][i], expected, rtol=1e-5, atol=1e-7)


def _row_by_hand(
    model: mpe.MPEEmbeddingBagCollection, quantizer: Any, table: EmbeddingBagConfig, row: int
) -> torch.Tensor:
    x = model.embedding_bags[table.name].weight[row].detach()
    alpha, beta, zero = quantizer.step_sizes(), quantizer.beta, quantizer.zero_row(table.name)

    def at(k: int, bits: int) -> torch.Tensor:
        if bits == 0:
            return zero
        return ((x - beta) / alpha[k]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * alpha[k] + beta

    belongs_to = int(quantizer.row_map(table.name)[row])
    if isinstance(quantizer, SearchQuantizer):
        p = quantizer.probabilities()[belongs_to]
        return sum(p[k] * at(k, b) for k, b in enumerate(quantizer.candidate_bits)).detach()
    assert isinstance(quantizer, RetrainQuantizer)
    return at(belongs_to, quantizer.candidate_bits[belongs_to]).detach()


def test_empty_batch_and_empty_features() -> None:
    model = searching()
    empty = KeyedJaggedTensor.from_lengths_sync(
        ["f1", "f2", "f3"], torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    )
    assert model(empty).values().shape == (0, 15)
    no_ids = KeyedJaggedTensor.from_lengths_sync(
        ["f1", "f2", "f3"], torch.zeros(0, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    )
    out = model(no_ids).values()
    assert out.shape == (2, 15) and not out.any()
    out.sum().backward()


def test_search_starts_uniform_and_rows_start_anew() -> None:
    model = torch.nn.Sequential(EmbeddingBagCollection(tables()))
    config = mpe.SearchConfig(num_groups=3, initialization=RowInitialization(seed=4, std=0.1))
    assert mpe.prepare_search_(model, counts(), config) is model
    collection = model[0]
    assert isinstance(collection, mpe.MPEEmbeddingBagCollection) and collection.phase is Phase.SEARCH
    for quantizer in collection.quantizers().values():
        assert isinstance(quantizer, SearchQuantizer)
        torch.testing.assert_close(quantizer.probabilities(), torch.full(quantizer.gamma.shape, 1 / 7))
        # alpha_b = 2 mean|W| / sqrt(2^(b-1)), mean|W| of N(0, 0.1) being 0.1 sqrt(2 / pi)
        torch.testing.assert_close(quantizer.step_sizes()[2], torch.tensor(2 * 0.0797885 / 2**0.5))
    expected = config.initialization.fill_(torch.empty(10, 4), "t1")
    torch.testing.assert_close(collection.embedding_bags["t1"].weight.data, expected)


def test_retrain_keeps_what_was_learned_and_resets_rows() -> None:
    model = searching()
    before = {name: p.detach().clone() for name, p in model.mpe.named_parameters()}
    with torch.no_grad():
        model.embedding_bags["t1"].weight += 1
    plan = mpe.sample_precision(model)
    mpe.prepare_retrain_(model, plan)
    after = dict(model.mpe.named_parameters())
    assert set(before) - set(after) == {"dim_4.gamma", "dim_3.gamma"}
    for name, value in after.items():
        torch.testing.assert_close(value.detach(), before[name], rtol=0, atol=0)
    expected = plan.initialization.fill_(torch.empty(10, 4), "t1")
    torch.testing.assert_close(model.embedding_bags["t1"].weight.data, expected)
    widths = model.mpe["dim_4"].row_map("t1")
    torch.testing.assert_close(torch.tensor(plan.candidate_bits)[widths.long()], plan.tables["t1"].of_rows().long())


def test_deepcopy_is_independent_and_state_dict_round_trips() -> None:
    model = searching()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.embedding_bags["t1"].weight.zero_()
        model.mpe["dim_4"].gamma.zero_()
    assert twin.embedding_bags["t1"].weight.any() and twin.mpe["dim_4"].gamma.any()
    assert twin(kjt()).values().any()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(kjt()).values(), model(kjt()).values(), rtol=0, atol=0)


def test_float64_runs_the_same_definition() -> None:
    model = searching().double()
    out = model(kjt())
    out.values().sum().backward()
    assert model.mpe["dim_4"].gamma.grad is not None and model.mpe["dim_4"].gamma.grad.dtype == torch.float64


def test_weighted_mean_is_refused() -> None:
    model = mpe.MPEEmbeddingBagCollection(tables(PoolingType.MEAN), is_weighted=True)
    with pytest.raises(ValueError, match=r"table t1 \(features f1, f2\) has mean pooling in a weighted"):
        mpe.prepare_search_(model, counts())
    assert model.phase is Phase.PLAIN


def test_other_data_types_are_refused() -> None:
    config = EmbeddingBagConfig(
        name="t1", num_embeddings=4, embedding_dim=4, feature_names=["f1"], data_type=DataType.FP16
    )
    with pytest.raises(ValueError, match="table t1 has data type"):
        mpe.prepare_search_(mpe.MPEEmbeddingBagCollection([config]), {"t1": torch.ones(4, dtype=torch.int64)})


def test_counts_and_plans_must_fit() -> None:
    model = mpe.MPEEmbeddingBagCollection(tables())
    with pytest.raises(ValueError, match="table t1 has 10 rows, its counts 3"):
        mpe.prepare_search_(model, {**counts(), "t1": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(KeyError, match="no counts for table t1"):
        mpe.prepare_search_(model, mpe.FrequencyCounter([]))
    with pytest.raises(KeyError, match="no bit-widths for table t1"):
        mpe.prepare_retrain_(model, uniform_precision(tables()[1:], 4))
    other = [EmbeddingBagConfig(name=t.name, num_embeddings=5, embedding_dim=4, feature_names=["f"]) for t in tables()]
    with pytest.raises(ValueError, match="table t1 is 10 x 4, in the precision plan it is 5 x 4"):
        mpe.prepare_retrain_(model, uniform_precision(other, 4))
    with pytest.raises(ValueError, match="Linear holds no EmbeddingBagCollection"):
        mpe.prepare_search_(torch.nn.Linear(1, 1), counts())
    with pytest.raises(ValueError, match="say which initial values"):
        mpe.reset_rows_(model)
