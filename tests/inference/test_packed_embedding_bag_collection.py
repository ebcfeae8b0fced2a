"""The packed collection as a TorchRec module."""

import copy

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.inference.models import kjt, retrained, tables
from torchrec_mpe.packing.pack import pack_tables
from torchrec_mpe.packing.size import size_report


def packed_collection(weighted: bool = False) -> mpe.PackedEmbeddingBagCollection:
    collection = mpe.emit_inference_model(retrained(weighted))
    assert isinstance(collection, mpe.PackedEmbeddingBagCollection)
    return collection


@pytest.mark.supports("empty batch, empty bags", "CPU")
def test_empty_batch_and_bags() -> None:
    packed = packed_collection()
    none = torch.zeros(0, dtype=torch.int64)
    empty = KeyedJaggedTensor.from_lengths_sync(["f1", "f2", "f3"], none, none)
    assert packed(empty).values().shape == (0, 17)
    bags = KeyedJaggedTensor.from_lengths_sync(["f1", "f2", "f3"], none, torch.zeros(9, dtype=torch.int64))
    assert packed(bags).values().shape == (3, 17) and not packed(bags).values().any()


def test_buffers_are_all_it_stores_and_survive() -> None:
    packed = packed_collection()
    before = packed(kjt()).values()
    assert packed.size_report().total == sum(b.numel() * b.element_size() for b in packed.buffers())
    assert not list(packed.parameters())
    twin = copy.deepcopy(packed)
    torch.testing.assert_close(twin(kjt()).values(), before, rtol=0, atol=0)
    torch.testing.assert_close(packed.half()(kjt()).values(), before, rtol=0, atol=0)  # scales stay float32
    twin.load_state_dict(packed.state_dict())
    torch.testing.assert_close(twin.to("cpu")(kjt()).values(), before, rtol=0, atol=0)
    assert "t1" in repr(packed) and "bytes" in repr(packed)


def test_a_damaged_state_dict_is_refused() -> None:
    packed = packed_collection()
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    state["tbe.weights_offsets"][0] = 10**12
    with pytest.raises(ValueError, match="table t1"):
        packed.load_state_dict(state)


def test_bad_input_is_named() -> None:
    packed = packed_collection()
    bad = KeyedJaggedTensor.from_lengths_sync(["f1", "f2", "f3"], torch.tensor([0, 1, 9]), torch.tensor([1, 1, 1]))
    with pytest.raises(IndexError, match=r"table t2, feature f3.* id 9"):
        packed(bad)
    lacking = KeyedJaggedTensor.from_lengths_sync(["f1", "f2"], torch.tensor([0, 1]), torch.tensor([1, 1]))
    with pytest.raises(KeyError, match="feature f3"):
        packed(lacking)
    with pytest.raises(ValueError, match="carry no weights"):
        packed_collection(weighted=True)(kjt())


@pytest.mark.supports("variable batch per feature", "CPU")
def test_variable_batch_per_feature() -> None:
    """Two bags for f1 and f2, one for f3 that both examples share."""
    packed = packed_collection()
    names = ["f1", "f2", "f3"]
    values, lengths = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1, 1, 1, 1, 1])
    variable = KeyedJaggedTensor(
        names,
        values,
        lengths=lengths,
        stride_per_key_per_rank=[[2], [2], [1]],
        inverse_indices=(names, torch.tensor([[0, 1], [0, 1], [0, 0]])),
    )
    full = KeyedJaggedTensor.from_lengths_sync(
        names, torch.tensor([1, 2, 3, 4, 5, 5]), torch.ones(6, dtype=torch.int64)
    )
    torch.testing.assert_close(packed(variable).values(), packed(full).values(), rtol=0, atol=0)


def test_configs_must_fit() -> None:
    packed = packed_collection().packed_tables()
    assert size_report(packed).total == packed.nbytes
    with pytest.raises(ValueError, match="t2"):
        mpe.PackedEmbeddingBagCollection(tables=[t for t in tables() if t.name != "t2"], packed=packed)
    with pytest.raises(ValueError, match="table t2: MEAN"):
        mpe.PackedEmbeddingBagCollection(tables=tables(), packed=packed, is_weighted=True)
    other = tables()
    other[0].num_embeddings = 13
    with pytest.raises(ValueError, match="table t1"):
        mpe.PackedEmbeddingBagCollection(tables=other, packed=packed)
    with pytest.raises(ValueError):
        mpe.PackedEmbeddingBagCollection(tables=tables(), packed=pack_tables([]))


def test_stock_fbgemm_as_storage() -> None:
    """Equal but for float16's rounding of the step sizes, with no op of ours, and larger."""
    packed = packed_collection()
    stock = mpe.PackedEmbeddingBagCollection(tables=tables(), packed=packed.packed_tables(), backend="fbgemm")
    assert stock.backend() == "fbgemm" and packed.backend() == "packed"
    ours, theirs = packed(kjt()), stock(kjt())
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(theirs.values(), ours.values(), rtol=1e-2, atol=1e-4)
    assert not torch.equal(theirs.values(), torch.zeros_like(theirs.values()))
    with pytest.raises(TypeError, match="FBGEMM's INT2, INT4 and INT8 rows"):
        stock.packed_tables()
    with pytest.raises(ValueError, match="no backend other"):
        mpe.PackedEmbeddingBagCollection(tables=tables(), packed=packed.packed_tables(), backend="other")


def test_ids_out_of_range_can_be_tolerated() -> None:
    packed = packed_collection().packed_tables()
    bad = KeyedJaggedTensor.from_lengths_sync(["f1", "f2", "f3"], torch.tensor([0, 1, 9]), torch.tensor([1, 1, 1]))
    good = KeyedJaggedTensor.from_lengths_sync(["f1", "f2", "f3"], torch.tensor([0, 1, 0]), torch.tensor([1, 1, 1]))
    for backend in ("packed", "fbgemm"):
        ebc = mpe.PackedEmbeddingBagCollection(tables(), packed, backend=backend, bounds_check_mode=2)
        torch.testing.assert_close(ebc(bad).values(), ebc(good).values(), rtol=0, atol=0)
