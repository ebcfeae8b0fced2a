"""Packed tables in FBGEMM's inference TBE."""

import copy
import io
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode as FbgemmBoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.fx import Tracer

from tests.packing.random_codings import coded_collection
from tests.packing.random_tables import KINDS, random_tables
from torchrec_mpe.inference.fbgemm_embedding_bags import FbgemmTableBatchedEmbeddingBags
from torchrec_mpe.inference.fbgemm_rows import fbgemm_rows, realigned
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.packing.packed_tables import PackedTables

DIMS = [8, 5, 16, 20, 3]
FEATURES = [4, 0, 0, 2, 1, 3, 0]  # tables with none to three features, not in order, not side by side


def all_kinds(seed: int = 0, **options: Any) -> tuple[PackedTables, list[Tensor]]:
    return random_tables(seed, DIMS, KINDS, max_rows=150, **options)


def ids_and_offsets(
    packed: PackedTables, features: Sequence[int], batch: int = 6, seed: int = 0, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Bags of 0 to 7 ids, from ``first`` on."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 8, (len(features), batch), generator=generator)
    ids = [
        torch.randint(first, packed.tables[t].num_embeddings, (int(n),), generator=generator)
        for t, n in zip(features, lengths.sum(1), strict=True)
    ]
    return torch.cat(ids), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])


def pooled(
    dense: Sequence[Tensor],
    features: Sequence[int],
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None = None,
    mean: Sequence[int] = (),
) -> Tensor:
    """[B, total_D] in float64, bag by bag."""
    batch = (offsets.numel() - 1) // len(features)
    columns: list[Tensor] = []
    for f, t in enumerate(features):
        bags = torch.zeros(batch, dense[t].shape[1], dtype=torch.float64)
        for b in range(batch):
            span = range(int(offsets[f * batch + b]), int(offsets[f * batch + b + 1]))
            for i in span:
                if ids[i] >= 0:
                    bags[b] += dense[t][ids[i]] * (1.0 if weights is None else weights[i].double())
            if f in mean and len(span):
                bags[b] /= len(span)
        columns.append(bags)
    return torch.cat(columns, dim=1)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.supports('backend="fbgemm": every row directory and bit-width', "CPU")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_directory_width_and_dimension(seed: int, weighted: bool) -> None:
    """The generator's step sizes are powers of two, exact in float16."""
    packed, dense = all_kinds(seed)
    tbe = FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [0] * len(FEATURES))
    ids, offsets = ids_and_offsets(packed, FEATURES, seed=seed, first=-1)
    weights = torch.rand(ids.numel(), generator=torch.Generator().manual_seed(seed)) - 0.3 if weighted else None
    assert_close(tbe(ids, offsets, weights), pooled(dense, FEATURES, ids, offsets, weights))
    assert tbe.D_offsets == [0, *itertools.accumulate(DIMS[t] for t in FEATURES)]


@pytest.mark.supports('backend="fbgemm": transform-coded tables', "CPU")
@pytest.mark.parametrize("remap", [False, True])
@pytest.mark.parametrize("kind", [SparseType.INT8, SparseType.INT4])
def test_coded_tables(kind: SparseType, remap: bool) -> None:
    """Within the error of the format: half a step of each row that is added, and a rounding of scale and bias."""
    components = [8, 5, None, 0, 2]
    packed, dense = coded_collection(5, DIMS, components, rows=120, remap=remap)
    tbe = FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [0] * len(FEATURES), coded_rows=kind)
    ids, offsets = ids_and_offsets(packed, FEATURES, first=-1)
    found, want = tbe(ids, offsets), pooled(dense, FEATURES, ids, offsets)
    bits = 8 if kind == SparseType.INT8 else 4
    steps = [
        0.0 if count is None else float((rows.amax(1) - rows.amin(1)).max()) / (2**bits - 1)
        for rows, count in zip(dense, components, strict=True)
    ]
    largest = [float(rows.abs().max()) for rows in dense]
    error = (found.double() - want).abs()
    for f, t in enumerate(FEATURES):
        of_feature = error[:, tbe.D_offsets[f] : tbe.D_offsets[f + 1]]
        assert float(of_feature.max()) <= 7 * (0.51 * steps[t] + 2**-10 * largest[t]), t
    assert bool((error > 0).any())
    sizes = {s.table: s.row_bytes(1) for s in tbe._sub_tables if components[s.table] is not None}
    assert sizes == {t: -(-DIMS[t] // 4) * 4 * bits // 8 + 4 for t in (0, 1, 3, 4)}
    with pytest.raises(ValueError, match="rows of coded tables can be INT2, INT4 or INT8, not"):
        FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [0] * len(FEATURES), coded_rows=SparseType.FP16)


@pytest.mark.parametrize("width", range(9))
def test_one_width_needs_no_map(width: int) -> None:
    packed, dense = random_tables(width, [12, 7], [Directory.RANKED, Directory.REMAP], max_rows=50, widths=[width])
    tbe = FbgemmTableBatchedEmbeddingBags(packed, [0, 1], [0, 0])
    ids, offsets = ids_and_offsets(packed, [0, 1], first=-1)
    assert_close(tbe(ids, offsets), pooled(dense, [0, 1], ids, offsets))
    assert tbe.row_map.numel() == (0 if width else sum(t.num_embeddings for t in packed.tables))


def test_tables_of_zero_bits_beside_others() -> None:
    zeros, zero_dense = random_tables(5, [8], [Directory.RANKED], max_rows=40, widths=[0])
    for features in ([0], [0, 0]):
        tbe = FbgemmTableBatchedEmbeddingBags(zeros, features, [0] * len(features))
        ids, offsets = ids_and_offsets(zeros, features, first=-1)
        assert_close(tbe(ids, offsets), pooled(zero_dense, features, ids, offsets))
    mixed, mixed_dense = random_tables(8, [8] * 6, [Directory.RANKED] * 6, max_rows=3, widths=[0, 0, 7])
    features = list(range(6))
    of_zeros = [t for t, table in enumerate(mixed_dense) if not bool((table != table[0]).any())]
    assert 0 < len(of_zeros) < 6
    ids, offsets = ids_and_offsets(mixed, features)
    tbe = FbgemmTableBatchedEmbeddingBags(mixed, features, [0] * 6)
    assert_close(tbe(ids, offsets), pooled(mixed_dense, features, ids, offsets))


def test_mean_counts_every_id_of_a_bag() -> None:
    packed, dense = all_kinds(1)
    tbe = FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [1, 0, 1, 1, 0, 1, 0])
    ids, offsets = ids_and_offsets(packed, FEATURES, first=-1)
    assert bool((ids == -1).any())
    assert_close(tbe(ids, offsets), pooled(dense, FEATURES, ids, offsets, mean=[0, 2, 3, 5]))
    with pytest.raises(ValueError, match="MEAN pooling takes no per-sample weights"):
        tbe(ids, offsets, torch.ones(ids.numel()))


@pytest.mark.parametrize("width", range(1, 9))
def test_off_by_no_more_than_float16_step_sizes(width: int) -> None:
    """2**-11 of |w| * |q| * alpha per row, and float32 rounding of code * scale + bias, of beta and of the sum."""
    features = [0, 1, 0]
    exact, dense = random_tables(width, [12, 7], [Directory.RANKED, Directory.REMAP], max_rows=50, widths=[width])
    packed = replace(exact, alpha=exact.alpha * 1.0004)
    tables: list[Tensor] = []
    bounds: list[Tensor] = []
    for t, table in enumerate(exact.tables):
        scales = int(exact.scale_index[t])
        beta = exact.beta[int(exact.beta_offsets[scales]) :][: table.embedding_dim].double()
        q = (dense[t] - beta) / exact.alpha[scales, width].double()
        alpha = packed.alpha[scales, width].double()
        assert torch.equal(q, q.round()) and float(alpha) != float(alpha.half())
        tables.append(q * alpha + beta)
        bounds.append(2**-11 * q.abs() * alpha + 2**-21 * (2**width * alpha + beta.abs()))
    tbe = FbgemmTableBatchedEmbeddingBags(packed, features, [0] * 3)
    ids, offsets = ids_and_offsets(packed, features)
    weights = torch.rand(ids.numel(), generator=torch.Generator().manual_seed(0)) - 0.5
    error = (tbe(ids, offsets, weights).double() - pooled(tables, features, ids, offsets, weights)).abs()
    bound = pooled(bounds, features, ids, offsets, weights.abs())
    assert bool((error <= bound).all())
    assert bool((error > 0.1 * bound).any())  # the bound says something


@pytest.mark.parametrize(("width", "format"), [(1, "INT2"), (2, "INT2"), (3, "INT4"), (4, "INT4"), (7, "INT8")])
def test_rows_are_those_of_a_stock_tbe(width: int, format: str) -> None:
    packed, dense = random_tables(width, [8], [Directory.RANKED], max_rows=50, widths=[width])
    ours = FbgemmTableBatchedEmbeddingBags(packed, [0], [0])
    rows = packed.tables[0].num_embeddings
    stock = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t0", rows, 8, SparseType[format], EmbeddingLocation.HOST)],
        device="cpu",
        output_dtype=SparseType.FP32,
        bounds_check_mode=FbgemmBoundsCheckMode.FATAL,
    )
    stock.initialize_weights()
    assert stock.weights_host.shape == ours.weights.shape
    stock.weights_host.copy_(ours.weights)
    every = torch.arange(rows)
    assert_close(stock(every, torch.arange(rows + 1)) + packed.beta, dense[0])


@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
def test_empty_batch_and_bags(indices_dtype: torch.dtype, offsets_dtype: torch.dtype) -> None:
    packed, dense = all_kinds(3)
    tbe = FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [0] * len(FEATURES))
    none = torch.zeros(0, dtype=indices_dtype)
    assert tbe(none, torch.zeros(1, dtype=offsets_dtype)).shape == (0, tbe.D_offsets[-1])
    bags = tbe(none, torch.zeros(2 * len(FEATURES) + 1, dtype=offsets_dtype))
    assert bags.shape == (2, tbe.D_offsets[-1]) and not bags.any()
    ids, offsets = ids_and_offsets(packed, FEATURES)
    kept = (ids.clone(), offsets.clone())
    assert_close(tbe(ids.to(indices_dtype), offsets.to(offsets_dtype)), pooled(dense, FEATURES, ids, offsets))
    assert torch.equal(ids, kept[0]) and torch.equal(offsets, kept[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_dtype(dtype: torch.dtype) -> None:
    packed, _ = all_kinds(4)
    ids, offsets = ids_and_offsets(packed, FEATURES)
    full = FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [0] * len(FEATURES))(ids, offsets)
    tbe = FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [0] * len(FEATURES), output_dtype=dtype)
    assert torch.equal(tbe(ids, offsets), full.to(dtype))


def out_of_range() -> tuple[PackedTables, list[Tensor], Tensor, Tensor]:
    """One bag for each of tables 0 and 1 whose second id is no row, and a third that is pruned."""
    packed, dense = all_kinds(5)
    rows = [table.num_embeddings for table in packed.tables]
    return packed, dense, torch.tensor([1, rows[0], -1, 0, -7, -1]), torch.tensor([0, 3, 6])


def test_fatal_names_table_and_feature() -> None:
    packed, _, ids, offsets = out_of_range()
    rows = packed.tables[0].num_embeddings
    tbe = FbgemmTableBatchedEmbeddingBags(packed, [0, 1], [0, 0])
    with pytest.raises(IndexError, match=rf"^table t0, feature 0: id {rows} is not in \[0, {rows}\)"):
        tbe(ids, offsets)
    named = FbgemmTableBatchedEmbeddingBags(packed, [0, 1], [0, 0], feature_labels=["a", "table b, feature c"])
    with pytest.raises(IndexError, match=r"^table b, feature c: id -7 is not in"):
        named(ids.clamp(max=1), offsets)
    with pytest.raises(ValueError, match="decrease"):
        tbe(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 3, 2]))
    with pytest.raises(ValueError, match="from 0 to the 2 ids"):
        tbe(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="decrease"):
        tbe(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2**32 + 1, 2]))


@pytest.mark.parametrize("mode", [BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE])
def test_other_checks_read_row_0(mode: BoundsCheckMode) -> None:
    packed, dense, ids, offsets = out_of_range()
    tbe = FbgemmTableBatchedEmbeddingBags(packed, [0, 1], [0, 0], bounds_check_mode=mode)
    expected = pooled(dense, [0, 1], torch.tensor([1, 0, -1, 0, 0, -1]), offsets)
    for calls in (1, 2):
        assert_close(tbe(ids, offsets), expected)
        assert int(tbe.bounds_check_warning) == (2 * calls if mode == BoundsCheckMode.WARNING else 0)
    moved = tbe(ids, torch.tensor([2, 99, 3]))  # all in the first bag
    assert_close(moved, pooled(dense, [0, 1], torch.tensor([1, 0, -1, 0, 0, -1]).clamp(max=1), torch.tensor([0, 6, 6])))


def test_no_check_still_prunes() -> None:
    packed, dense = all_kinds(6)
    tbe = FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [0] * len(FEATURES), bounds_check_mode=BoundsCheckMode.NONE)
    ids, offsets = ids_and_offsets(packed, FEATURES, first=-1)
    assert_close(tbe(ids, offsets), pooled(dense, FEATURES, ids, offsets))


def test_buffers_are_all_it_stores_and_survive() -> None:
    packed, _ = all_kinds(7)
    tbe = FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [0] * len(FEATURES))
    ids, offsets = ids_and_offsets(packed, FEATURES)
    before = tbe(ids, offsets)
    assert not list(tbe.parameters()) and not before.requires_grad
    assert tbe.nbytes == sum(b.numel() * b.element_size() for b in tbe.buffers())
    assert torch.equal(copy.deepcopy(tbe).half().to("cpu")(ids, offsets), before)
    twin = FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [0] * len(FEATURES))
    for name in ("weights", "row_map", "beta", "zero_rows"):
        getattr(twin, name).zero_()
    assert not torch.equal(twin(ids, offsets), before)
    assert not any(twin.load_state_dict(tbe.state_dict()))
    assert torch.equal(twin(ids, offsets), before)
    assert "bytes" in repr(tbe) and "t4" in repr(tbe)


def test_state_of_other_tables_is_refused() -> None:
    packed, _ = random_tables(1, [8, 8], [Directory.RANKED] * 2, max_rows=9)
    tbe = FbgemmTableBatchedEmbeddingBags(packed, [0, 1], [0, 0])
    state = {name: tensor.clone() for name, tensor in tbe.state_dict().items()}
    state["row_map"][0] = 4 * packed.tables[0].num_embeddings
    with pytest.raises(ValueError, match="table t0: the row map"):
        copy.deepcopy(tbe).load_state_dict(state)
    state = {name: tensor.clone() for name, tensor in tbe.state_dict().items()}
    state["sub_tables"][0, 2] += 1
    with pytest.raises(ValueError, match="other tables"):
        copy.deepcopy(tbe).load_state_dict(state)


def test_row_alignment() -> None:
    """What moving to CUDA does to the rows."""
    packed, _ = all_kinds(8)
    narrow, wide = (fbgemm_rows(packed, alignment) for alignment in (1, 16))
    assert wide.weights.numel() > narrow.weights.numel()
    assert torch.equal(realigned(narrow.weights, narrow.sub_tables, 1, 16), wide.weights)
    assert torch.equal(realigned(wide.weights, wide.sub_tables, 16, 1), narrow.weights)
    ids, offsets = ids_and_offsets(packed, FEATURES)
    one, sixteen = (
        FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [0] * len(FEATURES), row_alignment=alignment)
        for alignment in (1, 16)
    )
    assert torch.equal(one(ids, offsets), sixteen(ids, offsets))


@pytest.mark.supports('backend="fbgemm": every row directory and bit-width', "CUDA")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda() -> None:
    packed, dense = all_kinds(9)
    tbe = FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [0] * len(FEATURES)).to("cuda")
    ids, offsets = ids_and_offsets(packed, FEATURES, first=-1)
    actual = tbe(ids.cuda(), offsets.cuda()).cpu().double()
    torch.testing.assert_close(actual, pooled(dense, FEATURES, ids, offsets), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("mode", [BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE, BoundsCheckMode.NONE])
@pytest.mark.parametrize("weighted", [False, True])
def test_export(mode: BoundsCheckMode, weighted: bool) -> None:
    packed, _ = all_kinds(10)
    pooling = [0] * len(FEATURES) if weighted else [1, 0, 0, 1, 0, 0, 0]
    tbe = FbgemmTableBatchedEmbeddingBags(packed, FEATURES, pooling, bounds_check_mode=mode)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        ids, offsets = ids_and_offsets(packed, FEATURES, batch, first=-1)
        if mode != BoundsCheckMode.NONE:
            ids[1] = 10**6
        return (ids, offsets, torch.linspace(-1, 1, ids.numel())) if weighted else (ids, offsets)

    shapes = tuple({0: torch.export.Dim.AUTO} for _ in inputs(1))
    program = torch.export.export(copy.deepcopy(tbe), inputs(4), dynamic_shapes=shapes, strict=False)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    exported = torch.export.load(stored).module()
    for batch in (2, 9):
        assert torch.equal(exported(*inputs(batch)), tbe(*inputs(batch)))
    if mode == BoundsCheckMode.WARNING:
        assert int(exported.get_buffer("bounds_check_warning")) == int(tbe.bounds_check_warning) == 2


class Model(nn.Module):
    def __init__(self, tbe: FbgemmTableBatchedEmbeddingBags) -> None:
        super().__init__()
        self.tbe = tbe

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return 2 * self.tbe(ids, offsets)


@pytest.mark.supports('backend="fbgemm": FX and TorchScript', "CPU")
def test_script_and_fx() -> None:
    packed, _ = all_kinds(11)
    tbe = FbgemmTableBatchedEmbeddingBags(packed, FEATURES, [0] * len(FEATURES))
    ids, offsets = ids_and_offsets(packed, FEATURES, first=-1)
    model = Model(tbe)
    expected = model(ids, offsets)
    graph = Tracer(leaf_modules=["FbgemmTableBatchedEmbeddingBags"]).trace(model)
    scripted = torch.jit.script(torch.fx.GraphModule(model, graph))
    stored = io.BytesIO()
    torch.jit.save(scripted, stored)
    stored.seek(0)
    loaded = torch.jit.load(stored)
    assert torch.equal(loaded(ids, offsets), expected)
    with pytest.raises(torch.jit.Error, match="table t4, feature 0: id 1000000"):
        loaded(torch.full_like(ids, 10**6), offsets)


def test_misuse_is_named() -> None:
    packed, _ = all_kinds(0)
    build = FbgemmTableBatchedEmbeddingBags
    with pytest.raises(ValueError, match="at least one feature"):
        build(packed, [], [])
    with pytest.raises(ValueError, match="feature_table_map must lie in"):
        build(packed, [5], [0])
    with pytest.raises(ValueError, match="pooling modes"):
        build(packed, [0], [2])
    with pytest.raises(ValueError, match="2 features need 2 labels, got 1"):
        build(packed, [0, 1], [0, 0], feature_labels=["a"])
    with pytest.raises(TypeError, match="float64"):
        build(packed, [0], [0], output_dtype=torch.float64)
    for factor in (1e6, 1e-12):
        with pytest.raises(ValueError, match=r"table t\d: the step size .* float16's range"):
            build(replace(packed, alpha=packed.alpha * factor), [0], [0])
    tbe = build(packed, [0, 1], [0, 0])
    with pytest.raises(ValueError, match=r"2 \* batch \+ 1"):
        tbe(torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="indices"):
        tbe(torch.zeros(0), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="per_sample_weights"):
        tbe(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 0, 1]), torch.ones(2))
    with pytest.raises(ValueError, match=r"int32 offsets"):
        tbe(torch.zeros(1, dtype=torch.int32).expand(2**31), torch.tensor([0, 0, 2**31]))
