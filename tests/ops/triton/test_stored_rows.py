"""Writing and reading stored rows on Triton against the reference, bit for bit."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchrec_mpe.ops import triton_backend
from torchrec_mpe.ops.cache_tensors import STATE_BYTES, BackingStore, empty_store
from torchrec_mpe.ops.reference import stored_rows as reference
from torchrec_mpe.ops.triton import stored_rows

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of rows that span too much


def special_rows(dim: int) -> Tensor:
    """Rows of zeros, constants, tiny, huge and infinite values and NaN, and such whose bounds are on the grid."""
    steps = torch.arange(dim, dtype=torch.float32)
    rows = [
        torch.zeros(dim),
        -torch.zeros(dim),
        torch.full((dim,), 0.3),
        torch.full((dim,), -7.0),
        torch.full((dim,), 1e-42),
        torch.full((dim,), 3e38),
        steps * 3e37 * (-1) ** steps,
        steps % 16 - 4,
        steps * -4,
        steps.clone().fill_(1).index_fill(0, torch.tensor([1]), float("inf")),
        steps.clone().index_fill(0, torch.tensor([dim - 1]), float("nan")),
        -steps * 1e-8,
        torch.full((dim,), 4e-14),  # below the smallest that ue6m2 has
        torch.full((dim,), 0x7F800001, dtype=torch.int32).view(torch.float32),  # NaN by its lowest bit only
        torch.full((dim,), 1e4).index_fill(0, torch.tensor([1]), -1e-38),  # by the scale a subnormal number
    ]
    return torch.stack(rows)


def random_floats(dim: int, slots: int, g: torch.Generator) -> Tensor:
    values = torch.randn(slots, dim, generator=g) * torch.logspace(-9, 3, slots)[:, None]
    special = special_rows(dim)
    values[: len(special)] = special
    return values


class Example:
    """A table's store, cache and moves. ``bits``: 4, 8, or 0 for both."""

    def __init__(self, seed: int, bits: int, dim: int, states: Sequence[tuple[int, str]], rows: int = 150) -> None:
        g = torch.Generator().manual_seed(seed)
        slots, moves = 40, 33
        self.is_wide: int | Tensor = bits or torch.rand(rows, generator=g) < 0.4
        self.dim, self.layout, self.num_rows = dim, tuple(states), rows
        self.values = random_floats(dim, slots, g)
        self.states = [random_floats(elements + 2, slots, g)[:, 1:-1] for elements, _ in states]
        self.states = [
            state.abs().contiguous() if dtype == "ue6m2" else state.contiguous()
            for state, (_, dtype) in zip(self.states, states, strict=True)
        ]
        self.slots = torch.randperm(slots, generator=g)[:moves].int()
        self.rows = torch.randperm(rows, generator=g)[:moves].int()
        self.rows[0], self.rows[1:][self.rows[1:] == rows - 1] = rows - 1, self.rows[0].item()
        self.seed = int(torch.randint(2**62, (), generator=g))

    def store(self, device: torch.device) -> BackingStore:
        store = empty_store(self.is_wide, self.num_rows, self.dim, self.layout, device=device)
        for rows in (store.rows4, store.rows8):
            rows.fill_(0xA5)
        return store


def write(module: Any, examples: Sequence[Example], device: torch.device, **options: Any) -> list[BackingStore]:
    stores = [example.store(device) for example in examples]
    arguments: dict[str, Any] = {
        "states": [[state.to(device) for state in example.states] for example in examples],
        "batch": 3_000_000_000,
        "first_rows": [5 + 2**33 * t for t, _ in enumerate(examples)],
        "first_columns": [16 * t for t, _ in enumerate(examples)],
        "stochastic_rounding": True,
        **options,
    }
    module.write_stored_rows_(
        stores,
        [example.values.to(device) for example in examples],
        moves=[(example.slots.to(device), example.rows.to(device)) for example in examples],
        state_dtypes=[dtype for _, dtype in examples[0].layout],
        seeds=[example.seed for example in examples],
        **arguments,
    )
    return stores


def read(
    module: Any, examples: Sequence[Example], stores: Sequence[BackingStore], device: torch.device
) -> list[Tensor]:
    values = [torch.full_like(example.values, 9.0, device=device) for example in examples]
    states = [[torch.full_like(state, 9.0, device=device) for state in example.states] for example in examples]
    module.read_stored_rows_(
        stores,
        values,
        states,
        [(example.slots.to(device), example.rows.to(device)) for example in examples],
        [dtype for _, dtype in examples[0].layout],
    )
    return [tensor.cpu() for tensor in (*values, *(state for of_table in states for state in of_table))]


def equal(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = (x.cpu().contiguous().view(torch.uint8) for x in (a, b))
        assert torch.equal(a, b), (a != b).nonzero()[:5]


def both_ways(examples: Sequence[Example], device: torch.device, ours: Any = stored_rows, **options: Any) -> None:
    cpu = torch.device("cpu")
    stores = write(ours, examples, device, **options)
    expected = write(reference, examples, cpu, **options)
    for store, theirs in zip(stores, expected, strict=True):
        equal(store, theirs)
    equal(read(ours, examples, stores, device), read(reference, examples, expected, cpu))


@pytest.mark.parametrize("stochastic_rounding", [True, False])
@pytest.mark.parametrize("bits", [4, 8, 0])
@pytest.mark.parametrize("dim", [4, 8, 20, 128])
def test_codes_equal_the_reference(dim: int, bits: int, stochastic_rounding: bool, device: torch.device) -> None:
    both_ways([Example(dim, bits, dim, [])], device, stochastic_rounding=stochastic_rounding)


@pytest.mark.parametrize("stochastic_rounding", [True, False])
@pytest.mark.parametrize("dtype", list(STATE_BYTES))
@pytest.mark.parametrize("elements", [1, 20])
def test_states_equal_the_reference(elements: int, dtype: str, stochastic_rounding: bool, device: torch.device) -> None:
    both_ways([Example(elements, 0, 20, [(elements, dtype)])], device, stochastic_rounding=stochastic_rounding)


def test_several_states_and_tables(device: torch.device) -> None:
    # The second state's noise starts in the middle of eight elements, in every table elsewhere.
    examples = [
        Example(1, 0, 12, [(12, "bf16"), (1, "ue6m2"), (12, "fp32")]),
        Example(2, 8, 100, [(3, "bf16"), (9, "ue6m2"), (2, "fp32")], rows=64),
        Example(3, 4, 2, [(1, "bf16"), (1, "ue6m2"), (1, "fp32")], rows=65),
    ]
    both_ways(examples, device)


def test_more_moves_than_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "_PROGRAMS", 2)
    monkeypatch.setattr(stored_rows, "_TILE_ELEMENTS", 64)
    both_ways([Example(7, 0, 16, [(1, "fp32")]), Example(8, 4, 16, [(1, "fp32")])], device)


def test_states_can_be_left_out_and_strided(device: torch.device) -> None:
    example = Example(4, 0, 8, [(8, "bf16")])
    ours = write(stored_rows, [example], device, states=[[]])
    equal(ours[0], write(reference, [example], torch.device("cpu"), states=[[]])[0])
    wide = torch.cat([example.values, example.values], 1).to(device)
    assert not wide[:, :8].is_contiguous()
    example.values = wide[:, :8]
    both_ways([example], device)


def test_no_moves(device: torch.device) -> None:
    example = Example(5, 4, 8, [(1, "fp32")])
    example.slots, example.rows = example.slots[:0], example.rows[:0]
    both_ways([example], device)
    both_ways([example, Example(6, 8, 8, [(1, "fp32")])], device)
    stored_rows.write_stored_rows_([], [], [], [], ["fp32"], 1, [], [], [], True)


@pytest.mark.parametrize("bits", [4, 8, 0])
def test_moves_outside_the_cache_or_the_store_are_left_out(bits: int, device: torch.device) -> None:
    bad, good = Example(9, bits, 8, [(1, "fp32")]), Example(9, bits, 8, [(1, "fp32")])
    bad.slots[:5] = torch.tensor([-1, 40, 2**31 - 1, 3, 4])
    bad.rows[3:5] = torch.tensor([-1, 2**31 - 1])
    good.slots, good.rows = good.slots[5:], good.rows[5:]
    stores, expected = write(stored_rows, [bad], device), write(reference, [good], torch.device("cpu"))
    equal(stores[0], expected[0])
    equal(read(stored_rows, [bad], stores, device), read(reference, [good], expected, torch.device("cpu")))


def test_wrong_tensors_are_refused(device: torch.device) -> None:
    example = Example(5, 4, 8, [(1, "fp32")])
    with pytest.raises(ValueError, match="table 0: 4-bit rows have 6 bytes, but values and states 10"):
        store = empty_store(4, 150, 8, device=device)
        moves = [(example.slots.to(device), example.rows.to(device))]
        stored_rows.read_stored_rows_(
            [store], [example.values.to(device)], [[example.states[0].to(device)]], moves, ["fp32"]
        )
    mixed = Example(5, 0, 8, [])
    store = mixed.store(device)._replace(is_wide=torch.zeros(0, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="table 0 has 150 rows, but 0 words tell their widths"):
        stored_rows.read_stored_rows_([store], [mixed.values.to(device)], [[]], moves, [])
    example.values = example.values.double()
    with pytest.raises(TypeError, match="table 0: values must be float32"):
        write(stored_rows, [example], device)
    example.values = example.values.float().t().contiguous().t()
    with pytest.raises(ValueError, match="table 0: values: columns must follow each other"):
        write(stored_rows, [example], device)
    example.values = example.values.contiguous()
    example.rows = example.rows[1:]
    with pytest.raises(ValueError, match="table 0: 33 slots are moved, but 32 rows"):
        write(stored_rows, [example], device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs pinned memory and a GPU")
@pytest.mark.parametrize("bits", [4, 8, 0])
def test_stores_in_pinned_host_memory(bits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    host = torch.device("cpu")
    expected = write(reference, [Example(bits, bits, 20, [(20, "bf16")])], host)
    example = Example(bits, bits, 20, [(20, "bf16")])
    pinned = BackingStore(*(tensor.pin_memory() if tensor.numel() else tensor for tensor in example.store(host)))
    with monkeypatch.context() as patch:
        patch.setattr(example, "store", lambda _: pinned)
        write(stored_rows, [example], device)
    torch.cuda.synchronize()
    equal(pinned, expected[0])
    equal(read(stored_rows, [example], [pinned], device), read(reference, [example], expected, host))
    pageable = BackingStore(*(tensor.clone() for tensor in pinned))
    with pytest.raises(ValueError, match=r"table 0: rows. must be on cuda:0 or in pinned host memory, not on cpu"):
        read(stored_rows, [example], [pageable], torch.device("cuda:0"))


def test_as_the_dispatcher_calls_them(device: torch.device) -> None:
    def flat(op: str, stores: Any, values: Any, states: Any, moves: Any, state_dtypes: Any, *others: Any) -> None:
        of_all = [state for of_table in states for state in of_table]
        counts = [len(of_table) for of_table in states]
        lists = (list(of_table) for of_table in zip(*stores, strict=True))
        slots, rows = (list(of_table) for of_table in zip(*moves, strict=True))
        triton_backend.CUDA_CACHE[op](*lists, values, of_all, counts, slots, rows, state_dtypes, *others)

    def flat_write(stores: Any, values: Any, **options: Any) -> None:
        others = ("states", "moves", "state_dtypes", "batch", "seeds", "first_rows", "first_columns")
        flat("write_stored_rows_", stores, values, *(options[name] for name in others), options["stochastic_rounding"])

    def flat_read(*arguments: Any) -> None:
        flat("read_stored_rows_", *arguments)

    module = SimpleNamespace(write_stored_rows_=flat_write, read_stored_rows_=flat_read)
    examples = [Example(t, bits, 8, [(1, "fp32"), (8, "bf16")]) for t, bits in enumerate((4, 8, 0))]
    both_ways(examples, device, ours=module)
