"""Rows written to a backing store and read back: bits of the reference on every backend, errors, and their mean."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.ops.every_backend import CPU, FAST, on
from torchrec_mpe.ops import library
from torchrec_mpe.ops.cache_tensors import BackingStore, StoredRow, empty_store
from torchrec_mpe.ops.stored_rows import read_stored_rows_, write_stored_rows_

STATES = [[], ["fp32"], ["bf16"], ["ue6m2"], ["fp32", "ue6m2", "bf16"]]


def rows_of(slots: int, dim: int, g: torch.Generator) -> Tensor:
    """Rows of all magnitudes, the first of them special."""
    x = torch.randn(slots, dim, generator=g) * 10.0 ** torch.randint(-12, 8, (slots, 1), generator=g)
    x[0], x[1], x[2, 1], x[3, 3], x[4], x[5], x[6] = 0, 3.5, float("nan"), float("inf"), 3e38, -3e38, 1e-44
    x[7] = torch.randn(dim, generator=g) * 1e38
    x[8], x[9, ::2], x[9, 1::2], x[10, 0] = -0.0, 0.0, -0.0, float("-inf")
    x[11] = torch.arange(dim) - 1e6  # far from zero for its range
    for k in range(7):  # half-way between codes of 4 and of 8 bits, where a product's rounding shows
        for row, top, start in ((12 + k, 14, -20), (19 + k, 250, -400)):
            codes = torch.randint(top + 1, (dim,), generator=g) + 0.5
            codes[0], codes[1] = 0, top + 0.5
            x[row] = (start + codes) * (9 + k) / 8
    return x


def states_of(slots: int, elements: Sequence[int], g: torch.Generator) -> list[Tensor]:
    states = []
    for number in elements:
        x = torch.rand(slots, number, generator=g) * 10.0 ** torch.randint(-20, 12, (slots, 1), generator=g)
        x[:7] = torch.tensor([0, -1, float("nan"), float("inf"), float("-inf"), 3.4e38, 1e-44])[:, None]
        states.append(x)
    return states


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int32) if x.dtype == torch.float32 else x


def written(
    x: Tensor, bits: int, *, copies: int = 1, batch: int = 1, seed: int = 5, stochastic_rounding: bool = True
) -> tuple[BackingStore, Tensor]:
    """A store of copies of each row of x, and what is read of them, [copies, rows, D]."""
    n, dim = x.shape
    store = empty_store(bits, copies * n, dim)
    slots, rows = torch.arange(n).repeat(copies).int(), torch.arange(copies * n).int()
    write_stored_rows_([store], [x], [[]], [(slots, rows)], [], batch, [seed], [0], [0], stochastic_rounding)
    out = torch.full((copies * n, dim), 7.0)
    read_stored_rows_([store], [out], [[]], [(rows, rows)], [])
    return store, out.view(copies, n, dim)


def scales_of(store: BackingStore, bits: int, dim: int) -> Tensor:
    held = store.rows8 if bits == 8 else store.rows4
    byte = held[:, StoredRow(bits, dim).code_bytes].int()
    return ((101 << 23) + (byte << 20)).view(torch.float32)


@pytest.mark.parametrize("stochastic_rounding", [True, False])
@pytest.mark.parametrize("state_dtypes", STATES)
@pytest.mark.parametrize("bits", [4, 8, "mixed"])
@pytest.mark.parametrize("dim", [4, 8, 16, 20, 64, 100, 128])
def test_all_backends_write_and_read_the_same_bits(
    dim: int, bits: int | str, state_dtypes: list[str], stochastic_rounding: bool
) -> None:
    g = torch.Generator().manual_seed(dim)
    elements = [1, dim, 5][: len(state_dtypes)]
    num_rows, slots = [300, 1, 500], 100
    widths: list[int | Tensor] = [torch.rand(n, generator=g) < 0.4 if bits == "mixed" else int(bits) for n in num_rows]
    values = [rows_of(slots, dim, g) for _ in num_rows]
    states = [states_of(slots, elements, g) for _ in num_rows]
    rows = [torch.randperm(n, generator=g)[:moved].int() for n, moved in zip(num_rows, (77, 1, 0), strict=True)]
    moves = [(torch.randperm(slots, generator=g)[: len(r)].int(), r) for r in rows]
    moves[0] = (torch.arange(77, dtype=torch.int32), rows[0])  # the special rows among them
    results = {}
    for backend in FAST:
        stores = [
            empty_store(w, n, dim, list(zip(elements, state_dtypes, strict=True)))
            for w, n in zip(widths, num_rows, strict=True)
        ]
        read = [torch.full((slots, dim), 7.0) for _ in num_rows]
        read_states = [[torch.full((slots, e), 7.0) for e in elements] for _ in num_rows]
        with on(backend):
            write_stored_rows_(
                stores, values, states, moves, state_dtypes, 12345678, [2**63 - 9, 1, 2],
                [2**32 - 100, 0, 5], [8, 0, 0], stochastic_rounding,
            )  # fmt: skip
            back = [(slots_.flip(0).contiguous(), rows_) for slots_, rows_ in moves]
            read_stored_rows_(stores, read, read_states, back, state_dtypes)
        results[backend] = [*(t for s in stores for t in s), *read, *(s for of in read_states for s in of)]
    for backend in CPU:
        for expected, got in zip(results["reference"], results[backend], strict=True):
            assert torch.equal(bits_of(expected), bits_of(got)), backend


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bits", [4, 8])
def test_errors_are_below_the_step(backend: str, bits: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=g) * 10.0 ** torch.randint(-5, 2, (400, 1), generator=g)
    x += 3 * x[:, :1]
    for stochastic_rounding, steps in ((True, 1.0), (False, 0.5)):
        with on(backend):
            store, out = written(x, bits, stochastic_rounding=stochastic_rounding)
        scale = scales_of(store, bits, 64)[:, None]
        assert ((out[0] - x).abs() <= scale * steps * 1.0001 + x.abs() * 1e-6).all()
        # A scale half as large would not reach from the minimum to the maximum.
        needed = torch.maximum(
            (x.amax(1) - x.amin(1)) / (2**bits - 1), x.amin(1).abs() / (127 * {4: 0.25, 8: 4.0}[bits])
        )
        assert (scale[:, 0] <= 1.2 * needed.clamp(min=2e-8)).all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_and_rows_that_are_not_finite(backend: str, bits: int) -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    x[0], x[1, 2], x[2, 3] = 0, float("nan"), float("-inf")
    with on(backend):
        _, out = written(x, bits)
    assert torch.equal(bits_of(out[0, 0]), torch.zeros(16, dtype=torch.int32))
    assert out[0, 1:3].isnan().all() and out[0, 3].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_rounding_is_unbiased(backend: str, bits: int) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    copies = 4000
    with on(backend):
        store, out = written(x, bits, copies=copies)
        _, nearest = written(x, bits, copies=1, stochastic_rounding=False)
    step = scales_of(store, bits, 64)[:3, None].double()
    off = (out.double().mean(0) - x).abs() / step
    # A rounding's deviation is at most half a step: 6 deviations of the mean; noise of 16 bits adds less than 2^-16.
    bound = 6 * 0.5 / copies**0.5 + 2**-16
    assert (off < bound).all()
    assert ((nearest[0].double() - x).abs() / step).max() > 5 * bound  # nearest is off, whatever the copies


@pytest.mark.parametrize("backend", [FAST[0], FAST[-1]])
@pytest.mark.parametrize("dtype", ["bf16", "ue6m2"])
def test_states_are_rounded_without_bias(backend: str, dtype: str) -> None:
    copies = 20_000
    state = torch.tensor([[1.003, 0.77, 1e-3, 41.1, 5e-14]])
    store = empty_store(8, copies, 2, [(5, dtype)])
    slots, rows = torch.zeros(copies, dtype=torch.int32), torch.arange(copies, dtype=torch.int32)
    out, values = torch.zeros(copies, 5), torch.zeros(copies, 2)
    with on(backend):
        write_stored_rows_([store], [values[:1]], [[state]], [(slots, rows)], [dtype], 3, [1], [0], [0], True)
        read_stored_rows_([store], [values], [[out]], [(rows, rows)], [dtype])
    # Neighbouring values are at most a quarter (2 bits of mantissa) or 2^-7 of the value apart, those below the
    # smallest (7.2e-14) that and zero.
    apart = torch.tensor([0.25, 0.25, 0.25, 0.25, 1.5]) if dtype == "ue6m2" else torch.full((5,), 2.0**-7)
    off = ((out.double().mean(0) - state[0].double()) / state[0].double()).abs()
    assert (off < 6 * 0.5 * apart / copies**0.5 + 2**-15 * apart).all()
    assert (out.std(0) > 0).all()


@pytest.mark.parametrize("backend", [FAST[0], FAST[-1]])
@pytest.mark.parametrize("bits", [4, 8])
def test_small_updates_add_up_only_with_stochastic_rounding(backend: str, bits: int) -> None:
    copies, updates, dim = 400, 100, 4
    start = torch.tensor([0.0, 1.0, 0.5, 0.25])
    rows = torch.arange(copies, dtype=torch.int32)
    ends = {}
    with on(backend):
        for stochastic_rounding in (True, False):
            store = empty_store(bits, copies, dim)
            x = start.repeat(copies, 1)
            for batch in range(updates):
                moves = [(rows, rows)]
                write_stored_rows_([store], [x], [[]], moves, [], batch, [3], [0], [0], stochastic_rounding)
                read_stored_rows_([store], [x], [[]], moves, [])
                if batch == 0:
                    first = x.clone()
                x[:, 2] += 0.05 * scales_of(store, bits, dim)
            step = scales_of(store, bits, dim)[:, None]
            ends[stochastic_rounding] = ((x - first) / step)[:, 2].double()
    # Nearest rounding takes each update back; the last has not been written yet.
    assert (ends[False] < 0.06).all()
    # 99 roundings, each of deviation at most half a step, of 400 rows: 6 deviations of the mean. The first one's error
    # is in `first`.
    assert abs(ends[True].mean() - 0.05 * updates) < 6 * 0.5 * updates**0.5 / copies**0.5


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_writes_the_same(threads: int) -> None:
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(3000, 16, generator=g), torch.randn(100, 16, generator=g)]
    moves = [(torch.randperm(3000, generator=g).int(), torch.randperm(3000, generator=g).int()) for _ in range(1)]
    moves.append((torch.arange(100).int(), torch.arange(100).int()))
    results = []
    before = torch.get_num_threads()
    for number in (1, threads):
        torch.set_num_threads(number)
        try:
            stores = [empty_store(4, len(v), 16, [(16, "bf16")]) for v in values]
            out, states = [torch.zeros_like(v) for v in values], [[torch.zeros_like(v)] for v in values]
            write_stored_rows_(
                stores, values, [[v.abs()] for v in values], moves, ["bf16"], 1, [1, 2], [0, 0], [0, 0], True
            )
            read_stored_rows_(stores, out, states, moves, ["bf16"])
        finally:
            torch.set_num_threads(before)
        results.append([*(s.rows4 for s in stores), *out, *(s[0] for s in states)])
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)


@pytest.mark.parametrize("backend", FAST)
def test_states_that_are_left_out_stay(backend: str) -> None:
    rows = torch.arange(3, dtype=torch.int32)
    store = empty_store(8, 3, 4, [(1, "fp32")])
    state, values = torch.tensor([[1.0], [2.0], [3.0]]), torch.randn(3, 4)
    with on(backend):
        write_stored_rows_([store], [values], [[state]], [(rows, rows)], ["fp32"], 1, [1], [0], [0], True)
        write_stored_rows_([store], [values + 1], [[]], [(rows, rows)], ["fp32"], 2, [1], [0], [0], True)
        out, out_state = torch.zeros(3, 4), torch.zeros(3, 1)
        read_stored_rows_([store], [out], [[]], [(rows, rows)], ["fp32"])
        read_stored_rows_([store], [torch.zeros(3, 4)], [[out_state]], [(rows, rows)], ["fp32"])
    assert torch.equal(out_state, state) and (out - values - 1).abs().max() < 0.1


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("slot", "row"), [(-1, 0), (3, 0), (0, -1), (0, 9), (2**31 - 1, 0), (0, -(2**31))])
def test_moves_from_or_to_nowhere_are_refused(backend: str, slot: int, row: int) -> None:
    good = torch.arange(3, dtype=torch.int32)
    bad = (torch.tensor([1, slot], dtype=torch.int32), torch.tensor([1, row], dtype=torch.int32))
    stores = [empty_store(8, 9, 4), empty_store(torch.arange(9) % 2 == 0, 9, 4)]
    values = [torch.ones(3, 4), torch.ones(3, 4)]
    with on(backend):
        with pytest.raises(IndexError, match=r"table 1 has [39] (rows|slots), got the (row|slot)"):
            write_stored_rows_(stores, values, [[], []], [(good, good), bad], [], 1, [0, 0], [0, 0], [0, 0], True)
        with pytest.raises(IndexError, match="table 1 has"):
            read_stored_rows_(stores, values, [[], []], [(good, good), bad], [])
    assert not any(rows.any() for store in stores for rows in (store.rows4, store.rows8))
    assert all((v == 1).all() for v in values)


def test_misuse() -> None:
    rows = torch.arange(3, dtype=torch.int32)
    store, values, state = empty_store(8, 3, 4, [(1, "fp32")]), torch.ones(3, 4), torch.ones(3, 1)

    def write(
        store: BackingStore = store,
        values: Tensor = values,
        states: Sequence[Tensor] = (state,),
        slots: Tensor = rows,
        dtypes: Sequence[str] = ("fp32",),
        seeds: Sequence[int] = (1,),
    ) -> None:
        write_stored_rows_([store], [values], [states], [(slots, rows)], dtypes, 1, seeds, [0], [0], True)

    with pytest.raises(TypeError, match="table 0: values and states must be float32"):
        write(values=values.double())
    with pytest.raises(TypeError, match="table 0: slots and rows of moves must be int32"):
        write(slots=rows.long())
    with pytest.raises(ValueError, match=r"table 0: values must be \[slots, D\], D even"):
        write(values=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"table 0: its moves must be \[n\] slots and \[n\] rows"):
        write(slots=rows[:2])
    with pytest.raises(ValueError, match="table 0: it has 1 states, there are 2 state_dtypes"):
        write(dtypes=["fp32", "bf16"])
    with pytest.raises(ValueError, match="table 0: its 8-bit rows have 10 bytes, not 8"):
        write(dtypes=["bf16"])
    with pytest.raises(ValueError, match="cannot be stored as fp16"):
        write(dtypes=["fp16"])
    with pytest.raises(ValueError, match="as many seeds"):
        write(seeds=[])
    with pytest.raises(ValueError, match="equally many tables"):
        read_stored_rows_([store], [values], [], [(rows, rows)], [])
    assert not store.rows8.any()


@pytest.mark.skipif(not library.is_loaded(), reason="the operators are not built")
def test_what_does_not_fit_is_refused_by_the_op_too() -> None:
    op = torch.ops.torchrec_mpe.read_stored_rows_
    rows, none = torch.arange(3, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)
    store = empty_store(torch.tensor([True, False, True]), 3, 4)

    def read(
        rows4: Tensor = store.rows4,
        is_wide: Tensor = store.is_wide,
        before: Tensor = store.wide_before,
        out: Tensor | None = None,
        state_counts: Sequence[int] = (0,),
        slots: Tensor = rows,
    ) -> None:
        out = torch.zeros(3, 4) if out is None else out
        op([rows4], [store.rows8], [is_wide], [before], [out], [], state_counts, [slots], [rows], [])

    read()
    with pytest.raises(ValueError, match="is_wide is needed"):
        read(is_wide=none)
    with pytest.raises(ValueError, match="is_wide has 1 words and wide_before 0"):
        read(before=none.int())
    with pytest.raises(ValueError, match="place row 0 outside"):
        read(before=store.wide_before + 7)
    with pytest.raises(ValueError, match="4-bit rows have 3 bytes"):
        read(rows4=store.rows4[:, :3].contiguous())
    with pytest.raises(ValueError, match="rows4 must be contiguous"):
        read(rows4=torch.zeros(1, 8, dtype=torch.uint8)[:, ::2])
    with pytest.raises(ValueError, match="values must be contiguous"):
        read(out=torch.zeros(4, 3).t())
    with pytest.raises(TypeError, match="slots must be Int"):
        read(slots=rows.long())
    with pytest.raises(ValueError, match="it has 1 states"):
        read(state_counts=[1])
    with pytest.raises(ValueError, match="equally many tables"):
        read(state_counts=[])


@pytest.mark.skipif(not library.is_loaded(), reason="the operators are not built")
def test_ops_are_registered_as_torch_wants() -> None:
    rows = torch.arange(3, dtype=torch.int32)
    store, values, state = empty_store(4, 3, 4, [(1, "bf16")]), torch.rand(3, 4), torch.rand(3, 1)
    lists = [[t] for t in store], [values], [state], [1], [rows], [rows], ["bf16"]
    arguments = (*lists[0], *lists[1:])
    for op, others in (("read_stored_rows_", ()), ("write_stored_rows_", (1, [0], [0], [0], True))):
        torch.library.opcheck(getattr(torch.ops.torchrec_mpe, op).default, (*arguments, *others))
