"""Emission checks itself: what differs is found and named, what only rounds is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.distributed.equality import RW, TW, Case, local_batch, prepare, prepared_model, shard
from tests.distributed.ranks import Ranks
from tests.distributed.test_train_pipelines import Batch, Task
from tests.inference.models import kjt, retrained
from torchrec_mpe.inference import emit
from torchrec_mpe.inference.probe import draw_probe, probe_ids
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.packed_tables import PackedTables

DIRECTORY = {"t1": "bitmap", "t2": "ranked", "t3": "nibble"}


def _spoil(name: str, change: Callable[[PackedTables], Any], patch: pytest.MonkeyPatch) -> None:
    pack = emit.pack_tables

    def wrong(tables: Any) -> PackedTables:
        packed = pack(tables)
        change(packed)
        return packed

    patch.setattr(emit, "pack_tables", wrong)


def _flip(tensor: Tensor, position: int, mask: int = 1) -> None:
    tensor[position] ^= mask


# Table 2 has runs of 8 to 0 bits at multiples of 64 bytes, one row of 5 elements each; the last is its only 1-bit row.
SPOILED: dict[str, tuple[Callable[[PackedTables], Any], str]] = {
    "one bit of one row": (lambda p: _flip(p.weights, int(p.weights_offsets[1])), "table t2, feature f3"),
    "one bit of the last row": (lambda p: _flip(p.weights, int(p.weights_offsets[1]) + 7 * 64), "table t2, feature f3"),
    "a row that is kept": (lambda p: p.zero_row_offsets[2:].fill_(-1), "table t3, feature f2"),
    "an offset": (lambda p: p.beta[int(p.beta_offsets[1]) :].add_(0.001), "table t2, feature f3"),
    "a step size": (lambda p: p.alpha[int(p.scale_index[1])].mul_(1.001), "table t2, feature f3"),
    "no number": (lambda p: p.beta[int(p.beta_offsets[1]) :].fill_(float("nan")), "table t2, feature f3"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_differs_is_named(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = SPOILED[what]
    mpe.emit_inference_model(retrained(), directory=DIRECTORY)
    _spoil(what, change, monkeypatch)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(RuntimeError, match=f"^{message}: packed and retrained embeddings .* differ by"):
            mpe.emit_inference_model(retrained(), directory=DIRECTORY, output_dtype=dtype)


def test_a_batch_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is what is compared: here it does not meet the damage."""
    _spoil("", lambda p: _flip(p.weights, int(p.weights_offsets[1]) + 7 * 64), monkeypatch)
    harmless = KeyedJaggedTensor.from_lengths_sync(
        ["f1", "f2", "f3"], torch.tensor([11, 0, 0, 8]), torch.tensor([2, 1, 1])
    )
    mpe.emit_inference_model(retrained(), directory=DIRECTORY, probe=harmless)
    harmful = KeyedJaggedTensor.from_lengths_sync(["f1", "f2", "f3"], torch.arange(9), torch.tensor([0, 0, 9]))
    with pytest.raises(RuntimeError, match="table t2, feature f3"):
        mpe.emit_inference_model(retrained(), directory=DIRECTORY, probe=harmful)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (KeyedJaggedTensor.from_lengths_sync(["f1"], torch.tensor([1]), torch.tensor([1])), "table t1, feature f2"),
        (
            KeyedJaggedTensor.from_lengths_sync(["f1", "f2", "f3"], torch.tensor([9]), torch.tensor([0, 0, 1])),
            r"table t2, feature f3: id 9 is not in \[0, 9\)",
        ),
    ],
)
def test_a_batch_that_does_not_fit(probe: KeyedJaggedTensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"cannot read the probe batch: {message}"):
        mpe.emit_inference_model(retrained(), probe=probe)


def test_weights_must_come_with_the_batch() -> None:
    mpe.emit_inference_model(retrained(weighted=True), probe=kjt(weighted=True))
    with pytest.raises(ValueError, match="the collection is weighted, the features carry no weights"):
        mpe.emit_inference_model(retrained(weighted=True), probe=kjt())


def test_rows_far_from_zero_do_not_look_wrong() -> None:
    """Rounding grows with offset and step sizes, and so does what is allowed."""
    trained = retrained()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter *= 1000 if "beta" in name or "zero_rows" in name or "alpha" in name else 100
    mpe.emit_inference_model(trained)


def test_drawn_batch_reaches_every_kind_of_row() -> None:
    trained = retrained()
    widths = {table: w for q in trained.quantizers().values() for table, w in q.widths.items()}
    probe = draw_probe(
        trained.embedding_bag_configs(), {t: probe_ids(w) for t, w in widths.items()}, False, torch.device("cpu")
    ).to_dict()
    for feature, tables in (("f1", ["t1"]), ("f3", ["t2"]), ("f2", ["t1", "t3"])):
        lengths, ids = probe[feature].lengths(), probe[feature].values()
        assert int(lengths[0]) == 0 and int(lengths[1]) > 1
        rows = min(widths[table].num_embeddings for table in tables)
        assert int(ids.min()) == 0 and int(ids.max()) == rows - 1
        singles = set(ids[int(lengths[1]) :].tolist())
        for table in tables:
            of_row = widths[table].of_rows()
            found = {int(of_row[i]) for i in singles}
            assert found == set(of_row[:rows].tolist())


def test_drawn_ids_of_large_tables() -> None:
    """Both ends of every run; of thousands of runs, some and every bit-width."""
    few = TableBitWidths(10**6, 8, (0, 7, 5000, 10**6), (6, 2, 0))
    assert {0, 6, 7, 4999, 5000, 10**6 - 1} <= set(probe_ids(few).tolist())
    many = TableBitWidths(30_000, 8, tuple(range(0, 30_001, 3)), (*(1 + k % 2 for k in range(9_999)), 7))
    ids = probe_ids(many)
    assert len(ids) < 400 and set(many.of_rows()[ids].tolist()) == {1, 2, 7}
    ranks = torch.arange(3 * 2**20, dtype=torch.int32).flip(0)
    mapped = TableBitWidths(3 * 2**20, 8, (0, 1, 2**20 + 5, 3 * 2**20), (5, 3, 0), ranks)
    of_row = mapped.of_rows()
    expected = {int(end) for width in (5, 3, 0) for end in (of_row == width).nonzero().squeeze(1)[[0, -1]]}
    assert expected <= set(probe_ids(mapped).tolist()) and len(probe_ids(mapped)) < 50


# --- sharded --------------------------------------------------------------------------------------------------------

# An optimizer whose TBE counts iterations, which most do not on the CPU.
CASE = Case((RW, RW, RW, TW), phase="retrain", optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD)


def _states(model: nn.Module) -> dict[str, Any]:
    """All that a forward could change: parameters, buffers, iterations, and the order of features."""
    collection = model.module.ebc
    found: dict[str, Any] = {name: value.detach().clone() for name, value in model.named_parameters()}
    found |= {name: value.clone() for name, value in model.named_buffers()}
    found |= {f"{table} {row} {column}": value.clone() for table, row, column, value in collection.local_shards()}
    for k, kernel in enumerate(collection.kernels()):
        tbe = kernel.emb_module
        found |= {f"iter {k}": tbe.iter.clone(), f"iter_cpu {k}": tbe.iter_cpu.clone(), f"step {k}": tbe.step}
    order = (collection._has_uninitialized_input_dist, list(collection._features_order), len(collection._input_dists))
    return found | {"order": order, "training": [m.training for m in model.modules()]}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


def on_ranks() -> dict[str, Any]:
    """Emission before the first batch and after a step of training; then with damage on the second rank alone."""
    rank = torch.distributed.get_rank()
    out: dict[str, Any] = {}
    model = shard(prepared_model(CASE), CASE)
    for when in ("before", "after"):
        before = _states(model)
        mpe.emit_inference_model(model)
        out[f"untouched {when}"] = _same(before, _states(model))
        features, targets = local_batch(0, CASE, rank, 2)
        loss = ((model(features) - targets) ** 2).mean()
        loss.backward()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            _spoil("", lambda p: p.beta.add_(0.01), patch)
        out["damaged"] = _error(lambda: mpe.emit_inference_model(model))
    bad = KeyedJaggedTensor.from_lengths_sync(
        list("abcd"), torch.tensor([999 if rank == 1 else 0]), torch.tensor([1, 0, 0, 0])
    )
    out["bad batch"] = _error(lambda: mpe.emit_inference_model(model, probe=bad))
    emitted = mpe.emit_inference_model(model, probe=local_batch(1, CASE, rank, 2)[0])
    features = local_batch(2, CASE, rank, 2)[0]
    with torch.no_grad():
        out["difference"] = float((emitted(features) - model.eval()(features)).abs().max())
    return out


def in_a_pipeline() -> float:
    """Emission while a train pipeline has taken over the model's forward; the pipeline then goes on."""
    model = shard(prepare(Task(CASE), CASE), CASE)
    dense = [p for _, p in in_backward_optimizer_filter(model.named_parameters())]
    pipeline = TrainPipelineSparseDist(model, torch.optim.SGD(dense, lr=0.1), torch.device("cpu"))
    batches = iter([Batch(*local_batch(step, CASE, torch.distributed.get_rank(), 2)) for step in range(4)])
    pipeline.progress(batches)
    mpe.emit_inference_model(model)
    for _ in range(3):
        pipeline.progress(batches)
    mpe.emit_inference_model(model)
    return float(sum(values.double().sum() for *_, values in model.module.head.ebc.local_shards()))


def without_emission_in_a_pipeline() -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mpe, "emit_inference_model", lambda model: None)
        return in_a_pipeline()


def test_a_train_pipeline_does_not_notice(two_ranks: Ranks) -> None:
    assert two_ranks.run(in_a_pipeline) == two_ranks.run(without_emission_in_a_pipeline)


def _error(action: Callable[[], Any]) -> str:
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_all_ranks_compare_and_all_raise(two_ranks: Ranks) -> None:
    for result in two_ranks.run(on_ranks):
        assert result["untouched before"] and result["untouched after"]
        assert result["damaged"].startswith("RuntimeError: rank 1: table t0, feature a: packed and retrained")
        assert result["bad batch"].startswith(
            "ValueError: rank 1: the packed model cannot read the probe batch: table t0"
        )
        assert result["difference"] < 1e-5
