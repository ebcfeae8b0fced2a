"""The reference ops against a twin composed of autograd's own operations, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_mpe.ops import expected_quantization, fixed_quantization, use_backend

ALL_BITS = (0, 1, 2, 3, 4, 5, 6, 7, 8)


def round_straight_through(v: Tensor) -> Tensor:
    return v + (v.round() - v).detach()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    return x * factor + (x - x * factor).detach()


def lsq(x: Tensor, bits: int, alpha: Tensor, beta: Tensor, factor: float) -> Tensor:
    """LSQ+ as its paper writes it; autograd makes the gradients."""
    alpha, beta = scale_gradient(alpha, factor), scale_gradient(beta, factor)
    return round_straight_through((x - beta) / alpha).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * alpha + beta


def twin(rows, probabilities, group, alpha, beta, zero_rows, table, bits, scale):
    total = 0 * rows
    for k, b in enumerate(bits):
        if b == 0:
            quantized = zero_rows[table] if zero_rows is not None else torch.zeros_like(rows)
        else:
            quantized = lsq(rows, b, alpha[k], beta, float(scale[k]))
        total = total + probabilities[group, k : k + 1] * quantized
    return total


def example(bits, dim=5, rows=64, groups=4, tables=3, zero=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = {"generator": g, "dtype": torch.float64}
    leaves = {
        # Spread over several step sizes, so that both ends of every code range are passed.
        "rows": torch.randn(rows, dim, **make) * 3,
        "probabilities": torch.softmax(torch.randn(groups, len(bits), **make), 1),
        "alpha": torch.rand(len(bits), **make) * 0.5 + 0.05,
        "beta": torch.randn(dim, **make) * 0.1,
        "zero_rows": torch.randn(tables, dim, **make) if zero else None,
    }
    for leaf in leaves.values():
        if leaf is not None:
            leaf.requires_grad_()
    group = torch.randint(groups, (rows,), generator=g)
    table = torch.randint(tables, (rows,), generator=g)
    scale = torch.rand(len(bits), **make)
    return leaves, group, table, scale


def compare(ours: Tensor, theirs: Tensor, leaves: dict[str, Tensor | None]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9), dtype=ours.dtype)
    inputs = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    got = torch.autograd.grad(ours, list(inputs.values()), upstream, retain_graph=True, allow_unused=True)
    want = torch.autograd.grad(theirs, list(inputs.values()), upstream, allow_unused=True)
    for name, a, b in zip(inputs, got, want, strict=True):
        b = torch.zeros_like(inputs[name]) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("bits", [(0, 1, 2, 3, 4, 5, 6), ALL_BITS, (0, 4), (3,), (1,), (8,), (0,)])
@pytest.mark.parametrize("zero", [True, False])
def test_expected_quantization_equals_composed_autograd(bits: tuple[int, ...], zero: bool) -> None:
    leaves, group, table, scale = example(bits, zero=zero)
    args = leaves["rows"], leaves["probabilities"], group, leaves["alpha"], leaves["beta"], leaves["zero_rows"]
    number = table if zero else None
    compare(expected_quantization(*args, number, bits, scale), twin(*args, number, bits, scale), leaves)


@pytest.mark.parametrize("bits", [ALL_BITS, (0, 4), (3,), (0,)])
@pytest.mark.parametrize("zero", [True, False])
def test_fixed_quantization_is_expectation_of_one_hot(bits: tuple[int, ...], zero: bool) -> None:
    leaves, _, table, scale = example(bits, zero=zero)
    candidate = torch.randint(len(bits), (64,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    one_hot = torch.nn.functional.one_hot(torch.arange(len(bits)), len(bits)).double()
    number = table if zero else None
    rest = leaves["alpha"], leaves["beta"], leaves["zero_rows"]
    ours = fixed_quantization(leaves["rows"], candidate, *rest, number, bits, scale)
    theirs = twin(leaves["rows"], one_hot, candidate.long(), *rest, number, bits, scale)
    del leaves["probabilities"]
    compare(ours, theirs, leaves)


def test_values_by_hand() -> None:
    rows = torch.tensor([[-0.6, 0.24], [0.9, -5.0]])
    alpha, beta = torch.tensor([9.0, 0.5]), torch.tensor([0.0, 0.25])
    # 2 bits: codes -2..1. (-0.6 - 0)/0.5 = -1.2 -> -1; (0.24 - 0.25)/0.5 -> 0; 0.9/0.5 = 1.8 -> 2, cut to 1;
    # (-5 - 0.25)/0.5 -> cut to -2.
    quantized = torch.tensor([[-0.5, 0.25], [0.5, -0.75]])
    zero_rows = torch.tensor([[10.0, 20.0]])
    table = torch.zeros(2, dtype=torch.long)
    p = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    out = expected_quantization(rows, p, torch.tensor([0, 1]), alpha, beta, zero_rows, table, (0, 2), torch.ones(2))
    torch.testing.assert_close(out[0], 0.25 * zero_rows[0] + 0.75 * quantized[0])
    torch.testing.assert_close(out[1], zero_rows[0])
    fixed = fixed_quantization(rows, torch.tensor([1, 1]), alpha, beta, zero_rows, table, (0, 2), torch.ones(2))
    torch.testing.assert_close(fixed, quantized)


def test_gradients_by_hand() -> None:
    """One row of three elements, 2 bits, alpha 0.5, beta 0: inside, above and below the code range."""
    rows = torch.tensor([[0.3, 2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    beta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.1], dtype=torch.float64)
    out = fixed_quantization(rows, torch.tensor([0]), alpha, beta, None, None, (2,), scale)
    out.backward(torch.ones_like(out))
    assert rows.grad is not None and beta.grad is not None and alpha.grad is not None
    assert rows.grad.tolist() == [[1, 0, 0]]
    torch.testing.assert_close(beta.grad, torch.tensor([0, 0.1, 0.1], dtype=torch.float64))
    # round(0.6) - 0.6 = 0.4 inside; the bounds 1 and -2 outside.
    torch.testing.assert_close(alpha.grad, torch.tensor([0.1 * (0.4 + 1 - 2)], dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(
    st.sets(st.integers(0, 8), min_size=1),
    st.integers(1, 19),
    st.integers(0, 12),
    st.integers(0, 2**16),
)
def test_any_candidates_and_dimension(bits: set[int], dim: int, rows: int, seed: int) -> None:
    ordered = tuple(sorted(bits))
    leaves, group, table, scale = example(ordered, dim=dim, rows=rows, seed=seed)
    args = leaves["rows"], leaves["probabilities"], group, leaves["alpha"], leaves["beta"], leaves["zero_rows"]
    compare(expected_quantization(*args, table, ordered, scale), twin(*args, table, ordered, scale), leaves)


def test_backend_by_name() -> None:
    leaves, group, table, scale = example((0, 2))
    args = leaves["rows"], leaves["probabilities"], group, leaves["alpha"], leaves["beta"], leaves["zero_rows"], table
    with use_backend("reference"):
        inside = expected_quantization(*args, (0, 2), scale)
    torch.testing.assert_close(inside, expected_quantization(*args, (0, 2), scale, backend="reference"))
    with pytest.raises(ValueError, match="no backend fast"):
        expected_quantization(*args, (0, 2), scale, backend="fast")
    with pytest.raises(ValueError, match="no backend fast"), use_backend("fast"):
        pass
