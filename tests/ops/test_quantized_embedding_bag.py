"""Quantized and pooled bags on every backend against bags put together one by one from autograd's operations."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.every_backend import CPU, FAST, on
from tests.ops.test_quantize_rows import lsq
from torchrec_mpe.ops import triton_backend
from torchrec_mpe.ops.backends import use_backend
from torchrec_mpe.ops.bags import ARGUMENT_NAMES, MEAN, SUM, Bags, Gradients
from torchrec_mpe.ops.quantized_embedding_bag import quantized_embedding_bag, row_numbers, unique_ids

NUM_ROWS = (5, 9, 5)  # of the tables, of which the features look up 0, 1, 2 and 1
TABLES = (0, 1, 2, 1)
FIRST_ROWS = (0, 5, 14)


@dataclass(frozen=True)
class Case:
    search: bool = True
    bits: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    dim: int = 5
    bags: tuple[int, ...] = (3, 3, 3, 3)
    pooling: tuple[int, ...] = (SUM, MEAN, SUM, MEAN)
    weighted: bool = False
    zero: bool = True
    indexed: bool = False
    side_by_side: bool = False
    factor: float = 1.0
    max_length: int = 4
    id_type: torch.dtype = torch.int64
    seed: int = 0


@dataclass
class Example:
    leaves: dict[str, Tensor | None]
    ids: list[list[list[int]]] = field(default_factory=list)  # by feature and bag
    line_of_row: Tensor = field(default_factory=lambda: torch.empty(0))
    scale: Tensor = field(default_factory=lambda: torch.empty(0))


def example(case: Case) -> Example:
    g = torch.Generator().manual_seed(case.seed)
    make = {"generator": g, "dtype": torch.float64}
    ids: list[list[list[int]]] = []
    for feature, bags in enumerate(case.bags):
        lengths = torch.randint(case.max_length + 1, (bags,), generator=g).tolist()
        # A few ids are no rows of the table: FBGEMM reads row 0 for them.
        ids.append([torch.randint(-1, NUM_ROWS[TABLES[feature]] + 1, (n,), generator=g).tolist() for n in lengths])
    count = sum(len(bag) for bags in ids for bag in bags)
    leaves: dict[str, Tensor | None] = {
        "table_rows": torch.randn(sum(NUM_ROWS), case.dim, **make) * 3,
        "probabilities": torch.softmax(torch.randn(4, len(case.bits), **make), 1) if case.search else None,
        "alpha": torch.rand(len(case.bits), **make) * 0.5 + 0.05,
        "beta": torch.randn(case.dim, **make) * 0.1,
        "zero_rows": torch.randn(len(NUM_ROWS), case.dim, **make) if case.zero else None,
        "weights": torch.rand(count, **make) + 0.5 if case.weighted else None,
    }
    for leaf in leaves.values():
        if leaf is not None:
            leaf.requires_grad_()
    limit = 4 if case.search else len(case.bits)
    lines = torch.randint(limit, (sum(NUM_ROWS),), generator=g).to(torch.int16 if case.search else torch.uint8)
    return Example(leaves, ids, lines, torch.rand(len(case.bits), **make))


def row_of(feature: int, id_: int) -> int:
    table = TABLES[feature]
    return FIRST_ROWS[table] + (id_ if 0 <= id_ < NUM_ROWS[table] else 0)


def bags_of(case: Case, e: Example) -> Bags:
    lengths = torch.tensor([len(bag) for bags in e.ids for bag in bags], dtype=case.id_type)
    bags = Bags(
        ids=torch.tensor([i for bags in e.ids for bag in bags for i in bag], dtype=case.id_type),
        # Offsets that start elsewhere, as those of a slice of features do.
        offsets=torch.cat([torch.tensor([0]), lengths.cumsum(0)]).to(case.id_type) + 7,
        bags_per_feature=case.bags,
        first_row=[FIRST_ROWS[t] for t in TABLES],
        num_rows=[NUM_ROWS[t] for t in TABLES],
        table=TABLES,
        pooling_mode=case.pooling,
        per_sample_weights=e.leaves["weights"],
        side_by_side=case.side_by_side,
    )
    if case.indexed:
        distinct, index, row_offsets = unique_ids(bags.ids, bags.offsets, bags.bags_per_feature, bags.num_rows)
        bags = bags._replace(ids=distinct, index=index, row_offsets=row_offsets)
    return bags


def run(case: Case, e: Example, backend: str | None = None) -> Tensor:
    leaves, bags = e.leaves, bags_of(case, e)
    number = torch.tensor([row_of(f, i) for f, bags in enumerate(e.ids) for bag in bags for i in bag]).long()
    if bags.row_offsets is not None:
        number = row_numbers(bags.ids, bags.row_offsets, [1] * len(TABLES), bags.first_row, bags.num_rows).long()
    return quantized_embedding_bag(
        *(leaves["table_rows"][number], bags, e.line_of_row, leaves["probabilities"], leaves["alpha"]),
        *(leaves["beta"], leaves["zero_rows"], case.bits, e.scale),
        gradient_factor=case.factor,
        backend=backend,
    )


def bag_by_bag(case: Case, e: Example) -> Tensor:
    leaves = e.leaves
    pooled, n = [], 0
    for f, bags in enumerate(e.ids):
        for bag in bags:
            total = torch.zeros(case.dim, dtype=torch.float64)
            for i in bag:
                row = row_of(f, i)
                line = int(e.line_of_row[row])
                value = torch.zeros(case.dim, dtype=torch.float64)
                for k, b in enumerate(case.bits):
                    p = leaves["probabilities"][line, k] if case.search else float(line == k)
                    if b > 0:
                        q = lsq(leaves["table_rows"][row], b, leaves["alpha"][k], leaves["beta"], float(e.scale[k]))
                        value = value + p * q
                    elif case.zero:
                        value = value + p * leaves["zero_rows"][TABLES[f]]
                total = total + (leaves["weights"][n] * value if case.weighted else value)
                n += 1
            pooled.append(total / max(1, len(bag)) if case.pooling[f] == MEAN else total)
    stacked = torch.stack(pooled) if pooled else torch.zeros(0, case.dim, dtype=torch.float64)
    if case.side_by_side:
        stacked = torch.cat(stacked.split(list(case.bags)), dim=1)
    return stacked


def check(case: Case) -> None:
    e = example(case)
    ours, theirs = run(case, e), bag_by_bag(case, e)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9), dtype=ours.dtype)
    leaves = {name: leaf for name, leaf in e.leaves.items() if leaf is not None}
    got = torch.autograd.grad(ours, list(leaves.values()), upstream, allow_unused=True)
    if not theirs.requires_grad:
        assert all(g is None or not bool(g.any()) for g in got)
        return
    want = torch.autograd.grad(theirs, list(leaves.values()), upstream, allow_unused=True)
    for name, a, b in zip(leaves, got, want, strict=True):
        b = torch.zeros_like(leaves[name]) if b is None else b
        factor = 1 if name in ("table_rows", "weights") else case.factor
        a = torch.zeros_like(leaves[name]) if a is None else a
        torch.testing.assert_close(a, b * factor, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"gradient of {n}: {m}")


@pytest.fixture(params=FAST, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with on(request.param):
        yield request.param


CASES = [
    Case(),
    Case(weighted=True, factor=3.0),
    Case(zero=False, side_by_side=True),
    Case(dim=16, id_type=torch.int32),
    Case(dim=19, bits=(0, 1, 2, 3, 4, 5, 6, 7, 8), weighted=True),
    Case(dim=8, bits=(3,), pooling=(MEAN,) * 4),
    Case(bits=(0,)),
    Case(bags=(2, 0, 3, 1)),
    Case(bags=(0, 0, 0, 0)),
    Case(max_length=0),
    Case(max_length=1, bags=(1, 1, 1, 1), side_by_side=True),
]


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda c: str(CASES.index(c)))
def test_equals_bags_put_together_one_by_one(case: Case, search: bool, indexed: bool) -> None:
    check(replace(case, search=search, indexed=indexed))


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_any_case() -> None:
    @settings(max_examples=30, deadline=None)
    @given(
        st.builds(
            Case,
            search=st.booleans(),
            bits=st.sets(st.integers(0, 8), min_size=1, max_size=4).map(lambda b: tuple(sorted(b))),
            dim=st.integers(1, 18),
            bags=st.tuples(*[st.integers(0, 3)] * 4),
            pooling=st.tuples(*[st.sampled_from([SUM, MEAN])] * 4),
            weighted=st.booleans(),
            zero=st.booleans(),
            indexed=st.booleans(),
            factor=st.sampled_from([1.0, 2.0]),
            max_length=st.integers(0, 4),
            seed=st.integers(0, 2**16),
        )
    )
    def every_backend(case: Case) -> None:
        for name in FAST:
            with on(name):
                check(case)

    every_backend()


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("search", [False, True])
def test_any_number_of_threads_gives_the_same_bits(search: bool, indexed: bool) -> None:
    """More rows than a chunk has, by far."""
    case = Case(search=search, indexed=indexed, bags=(900,) * 4, max_length=12, weighted=True, dim=7)
    e = example(case)

    def everything() -> list[Tensor]:
        pooled = run(case, e)
        leaves = [leaf for leaf in e.leaves.values() if leaf is not None]
        return [pooled, *torch.autograd.grad(pooled, leaves, torch.ones_like(pooled))]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(2)
        together = everything()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_unique_ids_by_hand() -> None:
    ids = torch.tensor([5, 3, 5, 99, -1, 7, 7, 0])
    distinct, index, row_offsets = unique_ids(ids, torch.tensor([2, 4, 6, 7, 10]), [2, 2], [10, 9])
    # 99 and -1 are no rows and count as 0.
    assert distinct.tolist() == [5, 3, 0, 0, 7]
    assert index.tolist() == [0, 1, 0, 2, 3, 4, 4, 3]
    assert index.dtype == torch.int32 and distinct.dtype == ids.dtype
    assert row_offsets.tolist() == [0, 3, 5]


@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
def test_unique_ids_of_many(id_type: torch.dtype) -> None:
    """Ids that are far apart and many collisions."""
    g = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randint(2**31 - 1, (400,), generator=g), torch.arange(0, 2**31 - 1, 2**22)])
    ids = torch.cat([ids, ids.flip(0), torch.randint(10, (400,), generator=g)]).to(id_type)
    first = len(ids) - 400
    distinct, index, row_offsets = unique_ids(ids, torch.tensor([0, first, len(ids)]), [1, 1], [2**31 - 1, 10])
    assert torch.equal(distinct[index.long()], ids)
    for f, part in enumerate((ids[:first], ids[first:])):
        mine = distinct[row_offsets[f] : row_offsets[f + 1]]
        assert sorted(mine.tolist()) == sorted(set(part.tolist()))


def test_row_numbers_by_hand() -> None:
    ids = torch.tensor([1, 4, -1, 2], dtype=torch.int32)
    rows = row_numbers(ids, torch.tensor([0, 1, 2, 4]), [2, 1], [100, 50], [4, 3])
    assert rows.tolist() == [101, 100, 50, 52]
    assert rows.dtype == torch.int32


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "everything"])
def test_ops_are_registered_as_torch_wants(search: bool, bare: bool) -> None:
    """Without what may be left out, and with all of it."""
    case = Case(search=search, bits=(0, 3), dim=3, bags=(2, 2, 2, 2), side_by_side=True, factor=2.0)
    case = replace(case, zero=not bare, weighted=not bare)
    ops = torch.ops.torchrec_mpe
    arguments = op_arguments(case)
    torch.library.opcheck(ops.quantized_embedding_bag.default, requiring_gradients(arguments))
    grad = torch.ones(2, 12, dtype=torch.float64)
    torch.library.opcheck(ops.quantized_embedding_bag_backward.default, (grad, *arguments, not bare))
    torch.library.opcheck(ops.quantized_embedding_bag.default, op_arguments(replace(case, indexed=True)))
    bags = bags_of(case, example(case))
    of_ids = bags.ids, bags.offsets, list(bags.bags_per_feature), bags.first_row, bags.num_rows
    torch.library.opcheck(ops.row_numbers.default, of_ids)
    utils = ("test_schema", "test_faketensor")  # the number of distinct ids depends on the data
    torch.library.opcheck(ops.unique_ids.default, (*of_ids[:3], bags.num_rows), test_utils=utils)


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
@pytest.mark.parametrize("search", [True, False])
def test_compiles_into_one_graph(search: bool) -> None:
    case = Case(weighted=True, search=search)
    e = example(case)
    bags = bags_of(case, e)
    rows = torch.randn(len(bags.ids), case.dim, dtype=torch.float64, requires_grad=True)

    def pooled(rows: Tensor) -> Tensor:
        return 2 * quantized_embedding_bag(
            *(rows, bags, e.line_of_row, e.leaves["probabilities"], e.leaves["alpha"], e.leaves["beta"]),
            *(e.leaves["zero_rows"], case.bits, e.scale),
        )

    leaves = [rows, *(leaf for name, leaf in e.leaves.items() if name != "table_rows" and leaf is not None)]
    eager = torch.autograd.grad(pooled(rows).square().sum(), leaves)
    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager")(rows)
    torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), leaves), eager)


def test_backend_by_name() -> None:
    case = Case()
    e = example(case)
    with use_backend("reference"):
        inside = run(case, e)
    assert torch.equal(inside, run(case, e, backend="reference"))
    with pytest.raises(ValueError, match="no backend fast"):
        run(case, e, backend="fast")
    with pytest.raises(ValueError, match="no backend fast"), use_backend("fast"):
        pass


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": torch.tensor([0, 2, 1])}, ValueError, "offsets decrease at bag 1"),
        ({"offsets": torch.tensor([0, 1, 2])}, ValueError, "offsets span 2 of 3 ids"),
        ({"offsets": torch.tensor([0, 3])}, ValueError, r"offsets must be \[3\]"),
        ({"num_rows": [5]}, IndexError, "feature 0 has 5 rows from 0, of 4"),
        ({"table": [2]}, IndexError, "feature 0 is of table 2, of 1"),
        ({"row_map": torch.full((4,), 9)}, IndexError, "9 is not in 0 to 1"),
        ({"num_rows": [0]}, IndexError, "feature 0 looks up ids in a table of no rows"),
        ({"index": torch.tensor([0, 1, 5]), "row_offsets": torch.tensor([0, 3])}, IndexError, "index of id 2 is 5"),
        ({"index": torch.tensor([0, 1, 2])}, ValueError, "an index needs row_offsets"),
        ({"index": torch.tensor([[0, 1, 2]])}, ValueError, "one index an id"),
        (
            # A distinct id of a feature without rows, which no bag looks up.
            {
                **{"rows": torch.zeros(4, 2), "ids": torch.tensor([0, 0, 1, 2]), "offsets": torch.tensor([0, 0, 3])},
                **{"bags_per_feature": [1, 1], "first_row": [4, 0], "num_rows": [0, 4], "table": [0, 0]},
                **{"index": torch.tensor([1, 2, 3]), "row_offsets": torch.tensor([0, 1, 4]), "pooling_mode": [SUM] * 2},
            },
            IndexError,
            "feature 0 looks up ids in a table of no rows",
        ),
        ({"row_map": torch.zeros(4, 1, dtype=torch.int16)}, ValueError, "one group or candidate a row of the tables"),
        ({"row_map": torch.tensor(0)}, ValueError, "one group or candidate a row of the tables"),
        ({"row_map": torch.zeros(4, dtype=torch.uint16)}, TypeError, "expected an integer tensor"),
        ({"first_row": [2**63 - 1]}, IndexError, "feature 0 has 4 rows from 9223372036854775807, of 4"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    of_op = {"rows": torch.zeros(3, 2), "row_map": torch.zeros(4, dtype=torch.int16)}
    of_bags = {
        "ids": torch.tensor([0, 1, 2]),
        "offsets": torch.tensor([0, 1, 3]),
        "bags_per_feature": [2],
        "first_row": [0],
        "num_rows": [4],
        "table": [0],
        "pooling_mode": [SUM],
    }
    for name, value in change.items():
        (of_op if name in of_op else of_bags)[name] = value
    quantizer = torch.full((2, 2), 0.5), torch.ones(2), torch.zeros(2), torch.zeros(1, 2), (0, 2), torch.ones(2)
    with pytest.raises(error, match=message):
        quantized_embedding_bag(of_op["rows"], Bags(**of_bags), of_op["row_map"], *quantizer)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bits", [(1, 2, 3, 4, 5, 6, 7, 8, 8), (0, 4, 4), (0, 0)])
def test_repeated_candidates_are_refused(search: bool, bits: tuple[int, ...]) -> None:
    case = Case(search=search, bits=bits)
    compiled = torch.ops.torchrec_mpe.quantized_embedding_bag
    for run_one in (lambda: run(case, example(case)), lambda: compiled(*op_arguments(case))):
        with pytest.raises(ValueError, match=rf"candidate bit-widths \[.*\] repeat {bits[-1]}"):
            run_one()


@pytest.mark.parametrize(("bags", "feature"), [([-1, 3], 0), ([2, -1], 1), ([2, -2], 1)])
def test_negative_numbers_of_bags_are_refused(bags: list[int], feature: int) -> None:
    ids, offsets = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3])
    of_bags = Bags(ids, offsets, bags, [0, 0], [4, 4], [0, 0], [SUM, SUM])
    quantizer = torch.ones(2), torch.zeros(2), None, (0, 2), torch.ones(2)
    rows, row_map, p = torch.zeros(3, 2), torch.zeros(4, dtype=torch.uint8), torch.full((2, 2), 0.5)
    ops = torch.ops.torchrec_mpe
    runs = [
        lambda: quantized_embedding_bag(rows, of_bags, row_map, p, *quantizer),
        lambda: quantized_embedding_bag(rows, of_bags, row_map, None, *quantizer),
        lambda: row_numbers(ids, offsets, bags, [0, 0], [4, 4]),
        lambda: unique_ids(ids, offsets, bags, [4, 4]),
        lambda: ops.quantized_embedding_bag(rows, *of_bags, row_map, p, *quantizer, 1.0),
        lambda: ops.row_numbers(ids, offsets, bags, [0, 0], [4, 4]),
        lambda: ops.unique_ids(ids, offsets, bags, [4, 4]),
    ]
    for run_one in runs:
        with pytest.raises(ValueError, match=f"feature {feature} has {bags[feature]} bags"):
            run_one()


@pytest.mark.parametrize(
    ("dtype", "first", "rows"),
    [
        (torch.int32, 2**31 - 2, 4),
        (torch.int32, 2**31, 1),
        (torch.int32, 0, 2**32 + 1),
        (torch.int64, 2**63 - 2, 4),
        (torch.int64, -1, 4),
    ],
)
def test_row_numbers_that_ids_cannot_hold_are_refused(dtype: torch.dtype, first: int, rows: int) -> None:
    arguments = torch.tensor([0, 3], dtype=dtype), torch.tensor([0, 0, 2]), [1, 1], [0, first], [4, rows]
    for run_one in (row_numbers, torch.ops.torchrec_mpe.row_numbers):
        with pytest.raises(ValueError, match=f"feature 1 has {rows} rows from {first}, which do not fit"):
            run_one(*arguments)


def test_row_numbers_reach_the_largest_of_the_ids_type() -> None:
    rows = row_numbers(torch.tensor([3], dtype=torch.int32), torch.tensor([0, 1]), [1], [2**31 - 5], [4])
    assert rows.tolist() == [2**31 - 2]


def op_arguments(case: Case, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments as the dispatcher passes them."""
    e = example(case)
    bags = bags_of(case, e)
    if bags.index is not None and bags.row_offsets is not None:
        bags = bags._replace(index=bags.index + 2, row_offsets=bags.row_offsets + 2)
    rows = torch.randn(len(bags.ids), case.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    quantizer = (e.leaves[name] for name in ("probabilities", "alpha", "beta", "zero_rows"))
    flat = rows, *bags, e.line_of_row, *quantizer, case.bits, e.scale, case.factor
    lists = (list(v) if isinstance(v, tuple) else v for v in flat)
    return tuple(v.detach().to(device) if isinstance(v, Tensor) else v for v in lists)


def requiring_gradients(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.requires_grad_() if name in Gradients._fields and value is not None else value
        for name, value in zip(ARGUMENT_NAMES, arguments, strict=True)
    )


SOME = [
    Case(weighted=True, factor=3.0),
    Case(weighted=True, zero=False, side_by_side=True, id_type=torch.int32),
    Case(bags=(2, 0, 3, 1), bits=(0, 3)),
    Case(max_length=0),
]


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("case", SOME, ids=lambda c: str(SOME.index(c)))
def test_cuda_kernels_equal_those_of_the_cpu(case: Case, search: bool, indexed: bool) -> None:
    """What is registered for CUDA, called with the arguments that the dispatcher passes; Triton interprets."""
    case = replace(case, search=search, indexed=indexed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments, there = op_arguments(case), op_arguments(case, device)
    ops, kernels = torch.ops.torchrec_mpe, triton_backend.CUDA_EMBEDDING_BAG
    want = ops.quantized_embedding_bag(*arguments)
    ours = kernels["quantized_embedding_bag"](*there)
    torch.testing.assert_close(ours.cpu(), want, rtol=1e-12, atol=1e-12)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=want.dtype)
    for weights in (False, case.weighted):
        theirs = ops.quantized_embedding_bag_backward(grad, *arguments, weights)
        ours = kernels["quantized_embedding_bag_backward"](grad.to(device), *there, weights)
        assert len(ours) == len(theirs) == 6
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
@pytest.mark.parametrize("name", sorted(triton_backend.CUDA_EMBEDDING_BAG))
def test_cuda_kernels_are_registered(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torchrec_mpe::{name}", "CUDA")


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_gradient_of_another_shape_is_refused(side_by_side: bool, search: bool, indexed: bool) -> None:
    arguments = op_arguments(Case(side_by_side=side_by_side, search=search, indexed=indexed))
    out = torch.ops.torchrec_mpe.quantized_embedding_bag(*arguments)
    kernels = (
        triton_backend.quantized_embedding_bag_backward,
        torch.ops.torchrec_mpe.quantized_embedding_bag_backward,
    )
    for grad in (out[:-1], out[:, :-1], out.flatten(), out.reshape(out.shape[0] // 3, -1), out[0, 0]):
        for backward in kernels:
            with pytest.raises(ValueError, match="grad must be"):
                backward(grad, *arguments, False)


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_meta_tensors_have_shapes_and_gradients(search: bool, side_by_side: bool) -> None:
    arguments = op_arguments(Case(weighted=True, search=search, side_by_side=side_by_side), "meta")
    arguments = requiring_gradients(arguments)
    out = torch.ops.torchrec_mpe.quantized_embedding_bag(*arguments)
    assert out.device.type == "meta" and out.shape == ((3, 20) if side_by_side else (12, 5))
    out.sum().backward()
    named = dict(zip(ARGUMENT_NAMES, arguments, strict=True))
    for name in Gradients._fields:
        leaf = named[name]
        assert leaf is None or (leaf.grad.device.type == "meta" and leaf.grad.shape == leaf.shape)
    numbers = row_numbers(*arguments[1:6])
    assert numbers.device.type == "meta" and numbers.shape == arguments[1].shape
