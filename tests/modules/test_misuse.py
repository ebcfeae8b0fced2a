"""What a collection cannot be is said in one sentence, and what it can be is not refused."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.fx import Tracer
from torchrec.inference.modules import DEFAULT_QUANT_MAPPING, quantize_inference_model
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from torchrec_mpe.precision.from_frequencies import uniform_precision

TABLE = EmbeddingBagConfig(name="t", num_embeddings=40, embedding_dim=8, feature_names=["f", "g"])
COUNTS = {"t": torch.arange(40, 0, -1)}


def features() -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(["f", "g"], torch.tensor([3, 7, 39]), torch.tensor([1, 0, 2, 0]))


def collection(phase: str = "plain") -> mpe.MPEEmbeddingBagCollection:
    made = mpe.MPEEmbeddingBagCollection([TABLE])
    if phase == "search":
        mpe.prepare_search_(made, COUNTS)
    elif phase == "retrain":
        mpe.prepare_retrain_(made, uniform_precision(made, 3))
    return made


class Model(nn.Module):
    def __init__(self, phase: str = "plain") -> None:
        super().__init__()
        self.ebc = collection(phase)
        self.top = nn.Linear(16, 1)

    def forward(self, kjt: KeyedJaggedTensor) -> Tensor:
        logits: Tensor = self.top(self.ebc(kjt).values())
        return logits


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (-torch.ones(40, dtype=torch.int64), ": row 0 has -1 lookups"),
        (torch.full((40,), float("nan")), "must be a tensor of integers, they are torch.float32"),
        (torch.ones(40), "must be a tensor of integers, they are torch.float32"),
        (torch.ones(40, dtype=torch.bool), "must be a tensor of integers, they are torch.bool"),
        (torch.ones(40, dtype=torch.int64, device="meta"), "must be a tensor of integers, they are on meta"),
        ([1] * 40, "must be a tensor of integers, they are list"),
        (torch.ones(40, 1, dtype=torch.int64), r"must be of shape \[40\], it is \[40, 1\]"),
        (torch.full((40,), 2**62), r"add up to 1.84e\+20 lookups, more than 2\*\*53"),
    ],
    ids=["negative", "nan", "float", "bool", "meta", "list", "shape", "absurd"],
)
def test_counts_that_are_none(counts: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^counts of table t \(features f, g\).*{said}"):
        mpe.prepare_search_(collection(), {"t": counts})
    with pytest.raises(ValueError, match=said):
        mpe.precision_from_frequencies({"t": counts}, [TABLE], ratio=10)


def test_counts_of_any_integers() -> None:
    made = [mpe.prepare_search_(collection(), {"t": COUNTS["t"].to(dtype)}) for dtype in (torch.int32, torch.int64)]
    one, other = (m.mpe["dim_8"].layout_digest for m in made)  # type: ignore[union-attr, index]
    assert one == other


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision(dtype: torch.dtype) -> None:
    said = rf"t: rows and quantizers are {dtype}, they are trained in float32 .* leave the collection out of \.half\(\)"
    with pytest.raises(ValueError, match=said):
        mpe.prepare_search_(EmbeddingBagCollection([TABLE]).to(dtype), COUNTS)
    for phase in ("search", "retrain"):
        with pytest.raises(TypeError, match=said):
            collection(phase).to(dtype)(features())


def test_a_collection_without_tables() -> None:
    with pytest.raises(ValueError, match=r"^a collection without tables has nothing to look up: leave it out"):
        mpe.MPEEmbeddingBagCollection([])
    model = nn.ModuleDict({"some": EmbeddingBagCollection([TABLE]), "none": EmbeddingBagCollection([])})
    with pytest.raises(ValueError, match=r"^collection none has no tables: leave it out of the model"):
        mpe.prepare_search_(model, COUNTS)
    assert type(model["some"]) is EmbeddingBagCollection


def test_prepared_where_models_are_made_on_meta() -> None:
    for phase in ("search", "retrain"):
        with torch.device("meta"):
            on_meta = collection(phase)
        assert on_meta.embedding_bags["t"].weight.is_meta
        expected = collection(phase).mpe.state_dict()
        assert {name: value.device.type for name, value in on_meta.mpe.state_dict().items()} == dict.fromkeys(
            expected, "cpu"
        )
        torch.testing.assert_close(on_meta.mpe.state_dict(), expected, rtol=0, atol=0)


def test_quantize_inference_model_tells_of_what_it_passes_by() -> None:
    model = Model()
    with pytest.warns(UserWarning, match="passes tables t of a MPEEmbeddingBagCollection by, they stay float32"):
        assert type(quantize_inference_model(model).ebc) is mpe.MPEEmbeddingBagCollection  # type: ignore[union-attr]
    assert not hasattr(model.ebc, "qconfig")


def test_quantize_inference_model_takes_rows_of_the_plain_phase_alone() -> None:
    name = f"{mpe.MPEEmbeddingBagCollection.__module__}.MPEEmbeddingBagCollection"
    mapping = {**DEFAULT_QUANT_MAPPING, name: QuantEmbeddingBagCollection}
    model = Model()
    expected = model(features()).detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="quantization passes")
        quantized = quantize_inference_model(model, mapping)
    assert type(quantized.ebc) is QuantEmbeddingBagCollection
    torch.testing.assert_close(quantized(features()).detach(), expected, rtol=0, atol=1e-2)
    for phase in ("search", "retrain"):
        with pytest.raises(ValueError, match=f"^tables t are in the {phase} phase, .* with emit_inference_model"):
            quantize_inference_model(Model(phase), mapping)


@pytest.mark.supports("FX tracing of a collection in search and retrain, as a leaf", "CPU")
@pytest.mark.parametrize("phase", ["search", "retrain"])
def test_fx_takes_a_prepared_collection_for_a_leaf_or_not_at_all(phase: str) -> None:
    """torch.fx traces the forward of a root's class: TorchRec's, of fp32 rows."""
    said = f"^tables t: torch.fx cannot trace a MPEEmbeddingBagCollection in the {phase} phase; .* is_leaf_module"
    model = Model(phase)
    for root in (model.ebc, model):
        with pytest.raises(TypeError, match=said):
            torch.fx.symbolic_trace(root)
    graph = Tracer(leaf_modules=["MPEEmbeddingBagCollection"]).trace(model)
    torch.testing.assert_close(torch.fx.GraphModule(model, graph)(features()), model(features()), rtol=0, atol=0)
