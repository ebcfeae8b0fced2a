"""Rows quantized on Triton, for search and retraining, against the reference."""

import pytest
import torch
from torch import Tensor

from torchrec_mpe.ops.reference import quantize_rows as reference
from torchrec_mpe.ops.triton import quantize_rows as kernels
from torchrec_mpe.ops.triton.segment_sum import segment_sum

BITS = (0, 1, 2, 3, 4, 6, 8)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def example(
    rows: int, dim: int, dtype: torch.dtype, device: torch.device, search: bool, bits: tuple[int, ...] = BITS
) -> reference.RowsToQuantize:
    """Rows spread over several step sizes, so that both ends of every code range are passed."""
    g = torch.Generator().manual_seed(rows + dim)
    x = reference.RowsToQuantize(
        rows=torch.randn(rows, dim, generator=g, dtype=dtype) * 3,
        line=torch.randint(4 if search else len(bits), (rows,), generator=g),
        probabilities=torch.softmax(torch.randn(4, len(bits), generator=g, dtype=dtype), 1) if search else None,
        alpha=torch.rand(len(bits), generator=g, dtype=dtype) * 0.5 + 0.05,
        beta=torch.randn(dim, generator=g, dtype=dtype) * 0.1,
        zero_rows=torch.randn(3, dim, generator=g, dtype=dtype),
        table=torch.randint(3, (rows,), generator=g),
        candidate_bits=bits,
        gradient_scale=torch.rand(len(bits), generator=g, dtype=dtype),
    )
    return reference.RowsToQuantize(*(v.to(device) if isinstance(v, Tensor) else v for v in x))


def run(of, x: reference.RowsToQuantize) -> dict[str, Tensor]:
    """Output and gradients by name, of the reference's functions or the kernels'."""
    grad = torch.randn(x.rows.shape, generator=torch.Generator().manual_seed(9), dtype=x.rows.dtype).to(x.rows.device)
    gradients = of.quantize_rows_backward(grad, x)._asdict()
    return {"out": of.quantize_rows(x), **{name: value for name, value in gradients.items() if value is not None}}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        bound = tolerance * max(1.0, float(value.abs().max())) if value.numel() else 0.0
        torch.testing.assert_close(ours[name], value, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dim", [1, 5, 16, 24, 128])
@pytest.mark.parametrize("search", [True, False])
def test_equals_the_reference_forward_and_backward(dim, dtype, search, device):
    x = example(57, dim, dtype, device, search)
    compare(run(kernels, x), run(reference, x), TOLERANCE[dtype])


@pytest.mark.parametrize("bits", [(1,), (8,), (0, 5), (0,), (0, 1, 2, 3, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_any_candidates_with_and_without_zero_rows(bits, zero, search, device):
    x = example(9, 8, torch.float64, device, search, bits)
    if not zero:
        x = x._replace(zero_rows=None)
    compare(run(kernels, x), run(reference, x), 1e-12)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("search", [True, False])
def test_few_rows(rows, search, device):
    x = example(rows, 16, torch.float32, device, search)
    compare(run(kernels, x), run(reference, x), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bits", range(1, 9))
def test_half_way_values_round_to_even(bits, dtype, device):
    # Every half between and beyond the bounds, exactly: what the codes are is known without any rounding.
    high = 2 ** (bits - 1) - 1
    halves = torch.arange(-2 * high - 8, 2 * high + 9, dtype=dtype)
    scaled = halves / 2
    even = torch.tensor([h // 2 if h % 2 == 0 else (h // 2 + 1) // 2 * 2 for h in halves.long().tolist()], dtype=dtype)
    step = 0.25
    x = example(len(scaled), 1, dtype, device, False, (bits,))
    x = x._replace(
        rows=(scaled * step).unsqueeze(1).to(device),
        alpha=torch.full((1,), step, dtype=dtype, device=device),
        beta=torch.zeros(1, dtype=dtype, device=device),
    )
    out = kernels.quantize_rows(x)
    assert torch.equal(out.cpu().squeeze(1), even.clamp(-high - 1, high) * step)


def test_far_values_and_nan_are_the_references(device):
    x = example(4, 4, torch.float32, device, False)
    far = torch.tensor([3e38, -3e38, float("inf"), float("nan")], device=device)
    x = x._replace(rows=far.repeat(4, 1), line=(x.line + 1).clamp(max=6), zero_rows=None)
    torch.testing.assert_close(kernels.quantize_rows(x), reference.quantize_rows(x), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("search", [True, False])
def test_narrow_line_numbers(dtype, search, device):
    x = example(30, 8, torch.float64, device, search)
    compare(run(kernels, x._replace(line=x.line.to(dtype))), run(reference, x), 1e-12)


@pytest.mark.parametrize("search", [True, False])
def test_gradients_are_the_same_at_every_run(search, device):
    x = example(300, 8, torch.float32, device, search)
    first, second = run(kernels, x), run(kernels, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_segment_sum_of_skewed_and_empty_segments(device):
    g = torch.Generator().manual_seed(0)
    segment = torch.where(torch.rand(500, generator=g) < 0.9, 3, torch.randint(7, (500,), generator=g))
    values, weight = torch.randn(500, 5, generator=g, dtype=torch.float64), torch.rand(500, generator=g).double()
    ours = segment_sum(values.to(device), weight.to(device), segment.to(device), 9).cpu()
    for s in range(9):
        torch.testing.assert_close(ours[s], (values * weight[:, None])[segment == s].sum(0))


@pytest.mark.parametrize("name", ["probabilities", "alpha", "beta", "zero_rows", "gradient_scale"])
def test_mixed_dtypes_are_named(name, device):
    x = example(4, 4, torch.float32, device, True)
    with pytest.raises(TypeError, match=f"{name} must be torch.float32 like rows, got torch.float64"):
        kernels.quantize_rows(x._replace(**{name: getattr(x, name).double()}))
