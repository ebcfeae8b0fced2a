"""The emitted model stands in for the retrained one."""

import numpy as np
import pytest
import torch
from torch import nn

import torchrec_mpe as mpe
from tests.distributed.equality import CW, DP, GRID, RW, TW, TWCW, TWRW, Case, in_one_process, on_two_ranks_emitted
from tests.distributed.ranks import Ranks
from tests.inference.models import Model, kjt, retrained, tables


@pytest.mark.supports("emit_inference_model", "CPU")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_equals_the_retrained_collection(weighted: bool, dtype: torch.dtype) -> None:
    trained = retrained(weighted)
    packed = mpe.emit_inference_model(trained)
    assert isinstance(packed, mpe.PackedEmbeddingBagCollection)
    got, want = packed(kjt(dtype, weighted)), trained(kjt(dtype, weighted))
    assert got.keys() == want.keys() == ["f1", "f2@t1", "f3", "f2@t3"]
    assert got.length_per_key() == want.length_per_key()
    torch.testing.assert_close(got.values(), want.values(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_types(dtype: torch.dtype) -> None:
    trained = retrained()
    out = mpe.emit_inference_model(trained, output_dtype=dtype)(kjt()).values()
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), trained(kjt()).values(), rtol=1e-2, atol=1e-3)


SHARDED = [
    Case((TW, RW, RW, TW), phase="retrain"),
    Case((CW, DP, RW, TWCW), phase="retrain"),
    Case((TWRW, GRID, TW, GRID), phase="retrain", weighted=True),
    Case((RW, DP, TWRW, CW), phase="retrain", mean=True),
    Case((RW,), phase="retrain", kernel="dense", zero_row="zero"),
]


@pytest.mark.supports("emit_inference_model", "several ranks, gloo")
@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_two_ranks_emit_the_same_bytes(case: Case, two_ranks: Ranks) -> None:
    """All shards put together are the unsharded model's rows, and so are the packed bytes; both agree with it."""
    want = in_one_process(case, emit=True)["packed"]
    for rank in two_ranks.run(on_two_ranks_emitted, case):
        assert rank.keys() == want.keys()
        for name, tensor in rank.items():
            np.testing.assert_array_equal(tensor, want[name], err_msg=name)


def test_emission_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = Model(retrained()).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    packed = mpe.emit_inference_model(model)
    torch.testing.assert_close(packed(kjt()), model(kjt()), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        packed.over.weight.zero_()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("directory", "kinds"),
    [
        ("nibble", ["nibble", "nibble", "nibble"]),
        ("bitmap", ["bitmap_nibble", "bitmap_nibble", "bitmap_nibble"]),
        ({"t1": "remap", "t2": "ranked"}, ["remap", "ranked", "nibble"]),
    ],
)
def test_directories(directory: str | dict[str, str], kinds: list[str]) -> None:
    trained = retrained()
    packed = mpe.emit_inference_model(trained, directory=directory)
    assert isinstance(packed, mpe.PackedEmbeddingBagCollection)
    assert [table.directory_kind for table in packed.size_report().tables] == kinds
    torch.testing.assert_close(packed(kjt()).values(), trained(kjt()).values(), rtol=1e-6, atol=1e-6)


def test_directories_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="table t1 cannot have a ranked directory"):
        mpe.emit_inference_model(retrained(), directory="ranked")
    with pytest.raises(ValueError, match="a directory is chosen for t9; the tables are t1, t2, t3"):
        mpe.emit_inference_model(retrained(), directory={"t9": "nibble"})


def test_emission_needs_the_retrain_phase() -> None:
    with pytest.raises(ValueError, match="collection ebc is in the plain phase"):
        mpe.emit_inference_model(nn.ModuleDict({"ebc": mpe.MPEEmbeddingBagCollection(tables())}))
    with pytest.raises(ValueError, match="Linear holds no MPEEmbeddingBagCollection"):
        mpe.emit_inference_model(nn.Linear(1, 1))
