"""What the op makes of a row, on every backend, against a twin composed of autograd's own operations, in float64;
float32 against exact codes."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.every_backend import CPU, FAST, on
from torchrec_mpe.ops.backends import use_backend
from torchrec_mpe.ops.bags import SUM, Bags
from torchrec_mpe.ops.quantized_embedding_bag import quantized_embedding_bag

ALL_BITS = (0, 1, 2, 3, 4, 5, 6, 7, 8)


def quantize(
    rows: Tensor,
    line: Tensor,
    probabilities: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    bits: tuple[int, ...],
    scale: Tensor,
) -> Tensor:
    """The op with a bag for each row; the rows of a table, a feature each, stand together."""
    n = len(rows)
    of_table = [n] if table is None else table.bincount().tolist()
    features = len(of_table)
    bags = Bags(
        ids=torch.arange(n),
        offsets=torch.arange(n + 1),
        bags_per_feature=of_table,
        first_row=[0] * features,
        num_rows=[n] * features,
        table=range(features),
        pooling_mode=[SUM] * features,
    )
    return quantized_embedding_bag(rows, bags, line, probabilities, alpha, beta, zero_rows, bits, scale)


def round_straight_through(v: Tensor) -> Tensor:
    return v + (v.round() - v).detach()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    return x * factor + (x - x * factor).detach()


def lsq(x: Tensor, bits: int, alpha: Tensor, beta: Tensor, factor: float) -> Tensor:
    """LSQ+ as its paper writes it; autograd makes the gradients."""
    alpha, beta = scale_gradient(alpha, factor), scale_gradient(beta, factor)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    code = round_straight_through((x - beta) / alpha)
    # Not clamp, whose gradient at the bounds themselves is another one in torch 2.14.
    code = torch.where((low <= code) & (code <= high), code, code.detach().clamp(low, high))
    return code * alpha + beta


def twin(rows, line, probabilities, alpha, beta, zero_rows, table, bits, scale):
    if probabilities is None:
        probabilities = torch.eye(len(bits), dtype=rows.dtype)
    total = 0 * rows
    for k, b in enumerate(bits):
        if b == 0:
            quantized = zero_rows[table] if zero_rows is not None else torch.zeros_like(rows)
        else:
            quantized = lsq(rows, b, alpha[k], beta, float(scale[k]))
        total = total + probabilities[line.long(), k : k + 1] * quantized
    return total


def example(bits, search=True, dim=5, rows=64, groups=4, tables=3, zero=True, seed=0):
    """Arguments of :func:`quantize` by name."""
    g = torch.Generator().manual_seed(seed)
    make = {"generator": g, "dtype": torch.float64}
    arguments = {
        # Spread over several step sizes, so that both ends of every code range are passed.
        "rows": torch.randn(rows, dim, **make) * 3,
        "line": torch.randint(groups if search else len(bits), (rows,), generator=g),
        "probabilities": torch.softmax(torch.randn(groups, len(bits), **make), 1) if search else None,
        "alpha": torch.rand(len(bits), **make) * 0.5 + 0.05,
        "beta": torch.randn(dim, **make) * 0.1,
        "zero_rows": torch.randn(tables, dim, **make) if zero else None,
        "table": torch.randint(tables, (rows,), generator=g).sort().values if zero else None,
        "bits": bits,
        "scale": torch.rand(len(bits), **make),
    }
    for leaf in leaves_of(arguments).values():
        leaf.requires_grad_()
    return arguments


def leaves_of(arguments):
    names = "rows", "probabilities", "alpha", "beta", "zero_rows"
    return {name: arguments[name] for name in names if arguments[name] is not None}


def check(arguments) -> None:
    ours, theirs, leaves = quantize(**arguments), twin(**arguments), leaves_of(arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9), dtype=ours.dtype)
    got = torch.autograd.grad(ours, list(leaves.values()), upstream)
    want = torch.autograd.grad(theirs, list(leaves.values()), upstream, allow_unused=True)
    for name, a, b in zip(leaves, got, want, strict=True):
        b = torch.zeros_like(leaves[name]) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.fixture(params=FAST, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with on(request.param):
        yield request.param


@pytest.mark.parametrize("bits", [(0, 1, 2, 3, 4, 5, 6), ALL_BITS, (0, 4), (3,), (1,), (8,), (0,)])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_equals_composed_autograd(bits: tuple[int, ...], zero: bool, search: bool) -> None:
    check(example(bits, search, zero=zero))


def test_values_by_hand() -> None:
    rows = torch.tensor([[-0.6, 0.24], [0.9, -5.0]])
    alpha, beta = torch.tensor([9.0, 0.5]), torch.tensor([0.0, 0.25])
    # 2 bits: codes -2..1. (-0.6 - 0)/0.5 = -1.2 -> -1; (0.24 - 0.25)/0.5 -> 0; 0.9/0.5 = 1.8 -> 2, cut to 1;
    # (-5 - 0.25)/0.5 -> cut to -2.
    quantized = torch.tensor([[-0.5, 0.25], [0.5, -0.75]])
    zero_rows = torch.tensor([[10.0, 20.0]])
    table = torch.zeros(2, dtype=torch.long)
    p = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    out = quantize(rows, torch.tensor([0, 1]), p, alpha, beta, zero_rows, table, (0, 2), torch.ones(2))
    torch.testing.assert_close(out[0], 0.25 * zero_rows[0] + 0.75 * quantized[0])
    torch.testing.assert_close(out[1], zero_rows[0])
    fixed = quantize(rows, torch.tensor([1, 1]), None, alpha, beta, zero_rows, table, (0, 2), torch.ones(2))
    torch.testing.assert_close(fixed, quantized)


def test_gradients_by_hand() -> None:
    """One row of three elements, 2 bits, alpha 0.5, beta 0: inside, above and below the code range."""
    rows = torch.tensor([[0.3, 2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    beta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.1], dtype=torch.float64)
    out = quantize(rows, torch.tensor([0]), None, alpha, beta, None, None, (2,), scale)
    out.backward(torch.ones_like(out))
    assert rows.grad is not None and beta.grad is not None and alpha.grad is not None
    assert rows.grad.tolist() == [[1, 0, 0]]
    torch.testing.assert_close(beta.grad, torch.tensor([0, 0.1, 0.1], dtype=torch.float64))
    # round(0.6) - 0.6 = 0.4 inside; the bounds 1 and -2 outside.
    torch.testing.assert_close(alpha.grad, torch.tensor([0.1 * (0.4 + 1 - 2)], dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(
    st.sets(st.integers(0, 8), min_size=1),
    st.integers(1, 35),
    st.integers(0, 12),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_any_candidates_and_dimension(bits: set[int], dim: int, rows: int, search: bool, seed: int) -> None:
    arguments = example(tuple(sorted(bits)), search, dim=dim, rows=rows, seed=seed)
    for name in FAST:
        with on(name):
            check(arguments)


# Hypothesis runs one example many times and refuses fixtures that a test function's runs would share.
test_any_candidates_and_dimension = pytest.mark.parametrize("backend", ["reference"], indirect=True)(
    test_any_candidates_and_dimension
)


@pytest.mark.parametrize("dim", [1, 8, 16, 19, 32, 64])
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_float32_codes_are_those_of_division(bits: int, dim: int) -> None:
    g = torch.Generator().manual_seed(bits * 100 + dim)
    rows = torch.randn(200, dim, generator=g)
    alpha, beta = torch.tensor([0.0371]), torch.randn(dim, generator=g) * 0.1
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows[:4] = beta + 0.0371 * torch.tensor([[0.5], [1.5], [-0.5], [-2.5]])  # near ties
    codes = ((rows - beta) / alpha).round().clamp(low, high)
    out = quantize(rows, torch.zeros(200, dtype=torch.uint8), None, alpha, beta, None, None, (bits,), torch.ones(1))
    torch.testing.assert_close(out, codes * alpha + beta, rtol=0, atol=2e-7 * 2**bits)


def test_ties_round_to_even() -> None:
    """Step sizes that are powers of two divide exactly."""
    rows = torch.arange(-10, 11).float().div(8).unsqueeze(1)  # quarters of a step of 1/2
    zeros, one = torch.zeros(21, dtype=torch.long), torch.ones(1)
    even = torch.tensor([-2, -2, -2, -2, -2, -1, -1, -1, -0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]).float()
    args = torch.tensor([0.5]), torch.zeros(1), None, None, (2,), one
    for probabilities in (None, one.view(1, 1)):
        assert (quantize(rows, zeros, probabilities, *args).squeeze(1) * 2).tolist() == even.tolist()


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("search", [True, False])
def test_float32_equals_float64_of_the_reference(search: bool) -> None:
    """Rows in the middles of code cells, so that both precisions round alike."""
    bits = (0, 1, 2, 3, 4, 5, 6)
    arguments = example(bits, search, dim=24, rows=3000, groups=40)
    with torch.no_grad():
        arguments["alpha"].copy_(torch.tensor([1, 1, 1, 0.5, 0.25, 0.25, 0.125]))
        arguments["beta"].zero_()
        cell = arguments["rows"].mul(16).floor().div(16)
        arguments["rows"].copy_(cell + 1 / 32)
    names = list(leaves_of(arguments))

    upstream = torch.randn(arguments["rows"].shape, generator=torch.Generator().manual_seed(9))

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves_of(arguments).items()}
        out = quantize(**{**arguments, **leaves, "scale": arguments["scale"].to(dtype)})
        out.backward(upstream.to(dtype))
        return [out.detach(), *(leaves[name].grad for name in names)]

    got = run(torch.float32)
    with use_backend("reference"):
        want = run(torch.float64)
    for name, a, b in zip(["output", *names], got, want, strict=True):
        error = (a - b).abs().max() / b.abs().max()
        assert error < 3e-6, f"{name} is off by {error:.1e} of its largest value"


def test_not_a_number_stays() -> None:
    rows = torch.tensor([[float("nan"), 1.0, float("inf"), float("-inf")]])
    zeros, one = torch.zeros(1, dtype=torch.long), torch.ones(1)
    for probabilities in (None, one.view(1, 1)):
        out = quantize(rows, zeros, probabilities, one, torch.zeros(4), None, None, (3,), one)
        assert torch.isnan(out[0, 0])
        assert out[0, 1:].tolist() == [1, 3, -4]


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_row_maps_of_five_types(dtype: torch.dtype) -> None:
    arguments = example((0, 2, 5))
    ours = quantize(**{**arguments, "line": arguments["line"].to(dtype)})
    torch.testing.assert_close(ours, twin(**arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool])
@pytest.mark.parametrize("search", [True, False])
def test_other_row_maps_are_refused(dtype: torch.dtype, search: bool) -> None:
    arguments = example((0, 2), search)
    with pytest.raises(TypeError, match="expected an integer tensor"):
        quantize(**{**arguments, "line": (arguments["line"] % 2).to(dtype)})


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"line": torch.full((64,), 4)}, IndexError, "4 is not in 0 to 3"),
        ({"line": torch.full((64,), -1)}, IndexError, "-1 is not in 0 to 3"),
        ({"line": torch.zeros(64)}, TypeError, "expected an integer tensor"),
        ({"table": torch.full((64,), 3)}, IndexError, "feature 3 is of table 3, of 3"),
        ({"alpha": torch.ones(3, dtype=torch.float64)}, ValueError, "alpha must be"),
        ({"alpha": torch.ones(2)}, TypeError, "alpha is Float, rows Double"),
        ({"bits": (0, 9)}, ValueError, "bit-width 9 is not in 0 to 8"),
        ({"bits": ()}, ValueError, "no candidate bit-widths"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(**{**example((0, 2)), **change})
