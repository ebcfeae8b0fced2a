"""Expected and fixed quantization on Triton against the reference."""

import pytest
import torch
from torch import Tensor

from torchrec_mpe.ops.reference.expected_quantization import expected_quantization as reference_expected
from torchrec_mpe.ops.reference.fixed_quantization import fixed_quantization as reference_fixed
from torchrec_mpe.ops.triton.expected_quantization import expected_quantization
from torchrec_mpe.ops.triton.fixed_quantization import fixed_quantization
from torchrec_mpe.ops.triton.segment_sum import segment_sum

BITS = (0, 1, 2, 3, 4, 6, 8)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


class Example:
    """Rows spread over several step sizes, so that both ends of every code range are passed."""

    def __init__(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device, bits: tuple[int, ...] = BITS):
        g = torch.Generator().manual_seed(rows + dim)
        self.bits = bits
        self.leaves: dict[str, Tensor] = {
            "rows": torch.randn(rows, dim, generator=g, dtype=dtype) * 3,
            "probabilities": torch.softmax(torch.randn(4, len(bits), generator=g, dtype=dtype), 1),
            "alpha": torch.rand(len(bits), generator=g, dtype=dtype) * 0.5 + 0.05,
            "beta": torch.randn(dim, generator=g, dtype=dtype) * 0.1,
            "zero_rows": torch.randn(3, dim, generator=g, dtype=dtype),
        }
        self.group = torch.randint(4, (rows,), generator=g).to(device)
        self.table = torch.randint(3, (rows,), generator=g).to(device)
        self.candidate = torch.randint(len(bits), (rows,), generator=g).to(device)
        self.scale = torch.rand(len(bits), generator=g, dtype=dtype).to(device)
        self.grad = torch.randn(rows, dim, generator=g, dtype=dtype).to(device)
        self.leaves = {name: leaf.to(device) for name, leaf in self.leaves.items()}

    def run(self, op, expected: bool, zero: bool = True) -> dict[str, Tensor]:
        """Output and gradients by name."""
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in self.leaves.items()}
        if not expected:
            leaves.pop("probabilities")
        if not zero:
            leaves.pop("zero_rows")
        choice = (leaves["probabilities"], self.group) if expected else (self.candidate,)
        zero_rows, table = (leaves["zero_rows"], self.table) if zero else (None, None)
        out = op(leaves["rows"], *choice, leaves["alpha"], leaves["beta"], zero_rows, table, self.bits, self.scale)
        out.backward(self.grad)
        return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    for name, value in theirs.items():
        bound = tolerance * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(ours[name], value, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dim", [1, 5, 16, 24, 128])
@pytest.mark.parametrize("expected", [True, False])
def test_equals_the_reference_forward_and_backward(dim, dtype, expected, device):
    example = Example(57, dim, dtype, device)
    ours, theirs = (expected_quantization, reference_expected) if expected else (fixed_quantization, reference_fixed)
    compare(example.run(ours, expected), example.run(theirs, expected), TOLERANCE[dtype])


@pytest.mark.parametrize("bits", [(1,), (8,), (0, 5), (0,), (0, 1, 2, 3, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("expected", [True, False])
def test_any_candidates_with_and_without_zero_rows(bits, zero, expected, device):
    example = Example(9, 8, torch.float64, device, bits)
    ours, theirs = (expected_quantization, reference_expected) if expected else (fixed_quantization, reference_fixed)
    compare(example.run(ours, expected, zero), example.run(theirs, expected, zero), 1e-12)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("expected", [True, False])
def test_few_rows(rows, expected, device):
    example = Example(rows, 16, torch.float32, device)
    ours, theirs = (expected_quantization, reference_expected) if expected else (fixed_quantization, reference_fixed)
    results = example.run(ours, expected), example.run(theirs, expected)
    torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bits", range(1, 9))
def test_half_way_values_round_to_even(bits, dtype, device):
    # Every half between and beyond the bounds, exactly: what the codes are is known without any rounding.
    high = 2 ** (bits - 1) - 1
    halves = torch.arange(-2 * high - 8, 2 * high + 9, dtype=dtype)
    scaled = halves / 2
    even = torch.tensor([h // 2 if h % 2 == 0 else (h // 2 + 1) // 2 * 2 for h in halves.long().tolist()], dtype=dtype)
    step = 0.25
    out = fixed_quantization(
        (scaled * step).unsqueeze(1).to(device),
        torch.zeros(len(scaled), dtype=torch.long, device=device),
        torch.full((1,), step, dtype=dtype, device=device),
        torch.zeros(1, dtype=dtype, device=device),
        None,
        None,
        (bits,),
        torch.ones(1, dtype=dtype, device=device),
    )
    assert torch.equal(out.cpu().squeeze(1), even.clamp(-high - 1, high) * step)


def test_far_values_and_nan_are_the_references(device):
    example = Example(4, 4, torch.float32, device)
    far = torch.tensor([3e38, -3e38, float("inf"), float("nan")], device=device)
    example.leaves["rows"] = far.repeat(4, 1)
    arguments = (example.candidate + 1).clamp(max=6), example.leaves["alpha"], example.leaves["beta"], None, None
    for op in (fixed_quantization, reference_fixed):
        out = op(example.leaves["rows"], *arguments, BITS, example.scale)
        if op is fixed_quantization:
            ours = out
    torch.testing.assert_close(ours, out, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("expected", [True, False])
def test_narrow_group_candidate_and_table_numbers(dtype, expected, device):
    example = Example(30, 8, torch.float64, device)
    ours, theirs = (expected_quantization, reference_expected) if expected else (fixed_quantization, reference_fixed)
    result = example.run(theirs, expected)
    example.group, example.candidate, example.table = (
        numbers.to(dtype) for numbers in (example.group, example.candidate, example.table)
    )
    compare(example.run(ours, expected), result, 1e-12)


def test_gradients_are_the_same_at_every_run(device):
    example = Example(300, 8, torch.float32, device)
    first, second = (example.run(expected_quantization, True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_segment_sum_of_skewed_and_empty_segments(device):
    g = torch.Generator().manual_seed(0)
    segment = torch.where(torch.rand(500, generator=g) < 0.9, 3, torch.randint(7, (500,), generator=g))
    values, weight = torch.randn(500, 5, generator=g, dtype=torch.float64), torch.rand(500, generator=g).double()
    ours = segment_sum(values.to(device), weight.to(device), segment.to(device), 9).cpu()
    for s in range(9):
        torch.testing.assert_close(ours[s], (values * weight[:, None])[segment == s].sum(0))


@pytest.mark.parametrize("name", ["alpha", "beta", "zero_rows"])
def test_mixed_dtypes_are_named(name, device):
    example = Example(4, 4, torch.float32, device)
    example.leaves[name] = example.leaves[name].double()
    with pytest.raises(TypeError, match=f"{name} must be torch.float32 like rows, got torch.float64"):
        example.run(fixed_quantization, False)
