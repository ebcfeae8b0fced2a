"""Every backend against a twin composed of autograd's own operations, in float64; float32 against exact codes."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.every_backend import CPU, FAST, on
from torchrec_mpe.ops import triton_backend
from torchrec_mpe.ops.backends import use_backend
from torchrec_mpe.ops.quantization import expected_quantization, fixed_quantization

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


@pytest.fixture(params=FAST, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with on(request.param):
        yield request.param


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
    st.integers(1, 35),
    st.integers(0, 12),
    st.integers(0, 2**16),
)
def test_any_candidates_and_dimension(bits: set[int], dim: int, rows: int, seed: int) -> None:
    ordered = tuple(sorted(bits))
    leaves, group, table, scale = example(ordered, dim=dim, rows=rows, seed=seed)
    args = leaves["rows"], leaves["probabilities"], group, leaves["alpha"], leaves["beta"], leaves["zero_rows"]
    for name in FAST:
        with on(name):
            compare(expected_quantization(*args, table, ordered, scale), twin(*args, table, ordered, scale), leaves)


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
    out = fixed_quantization(rows, torch.zeros(200, dtype=torch.uint8), alpha, beta, None, None, (bits,), torch.ones(1))
    torch.testing.assert_close(out, codes * alpha + beta, rtol=0, atol=2e-7 * 2**bits)


def test_ties_round_to_even() -> None:
    """Step sizes that are powers of two divide exactly."""
    rows = torch.arange(-10, 11).float().div(8).unsqueeze(1)  # quarters of a step of 1/2
    zeros, one = torch.zeros(21, dtype=torch.long), torch.ones(1)
    even = torch.tensor([-2, -2, -2, -2, -2, -1, -1, -1, -0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]).float()
    args = torch.tensor([0.5]), torch.zeros(1), None, None, (2,), one
    assert (fixed_quantization(rows, zeros, *args).squeeze(1) * 2).tolist() == even.tolist()
    assert (expected_quantization(rows, one.view(1, 1), zeros, *args).squeeze(1) * 2).tolist() == even.tolist()


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_float32_equals_float64_of_the_reference() -> None:
    """Rows in the middles of code cells, so that both precisions round alike."""
    bits = (0, 1, 2, 3, 4, 5, 6)
    leaves, group, table, scale = example(bits, dim=24, rows=3000, groups=40)
    with torch.no_grad():
        leaves["alpha"].copy_(torch.tensor([1, 1, 1, 0.5, 0.25, 0.25, 0.125]))
        leaves["beta"].zero_()
        cell = leaves["rows"].mul(16).floor().div(16)
        leaves["rows"].copy_(cell + 1 / 32)
    names = ["rows", "probabilities", "alpha", "beta", "zero_rows"]

    upstream = torch.randn(leaves["rows"].shape, generator=torch.Generator().manual_seed(9))

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaf = {name: leaves[name].detach().to(dtype).requires_grad_() for name in names}
        out = expected_quantization(
            *(leaf["rows"], leaf["probabilities"], group, leaf["alpha"], leaf["beta"], leaf["zero_rows"]),
            *(table, bits, scale.to(dtype)),
        )
        out.backward(upstream.to(dtype))
        return [out.detach(), *(leaf[name].grad for name in names)]

    got = run(torch.float32)
    with use_backend("reference"):
        want = run(torch.float64)
    for name, a, b in zip(["output", *names], got, want, strict=True):
        error = (a - b).abs().max() / b.abs().max()
        assert error < 3e-6, f"{name} is off by {error:.1e} of its largest value"


def test_not_a_number_stays() -> None:
    rows = torch.tensor([[float("nan"), 1.0, float("inf"), float("-inf")]])
    zeros, one = torch.zeros(1, dtype=torch.long), torch.ones(1)
    for out in (
        fixed_quantization(rows, zeros, one, torch.zeros(4), None, None, (3,), one),
        expected_quantization(rows, one.view(1, 1), zeros, one, torch.zeros(4), None, None, (3,), one),
    ):
        assert torch.isnan(out[0, 0])
        assert out[0, 1:].tolist() == [1, 3, -4]


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_any_number_of_threads_gives_the_same_bits() -> None:
    """More rows than a chunk has, by far."""
    bits = (0, 1, 2, 3, 4, 5, 6)
    leaves, group, table, scale = example(bits, dim=7, rows=30_000)
    leaves = {name: leaf.detach().float() for name, leaf in leaves.items()}
    candidate = group % len(bits)
    grad = torch.randn(30_000, 7, generator=torch.Generator().manual_seed(4))
    rest = leaves["alpha"], leaves["beta"], leaves["zero_rows"], table, bits, scale.float()
    ops = torch.ops.torchrec_mpe

    def run() -> list[Tensor]:
        searched = leaves["rows"], leaves["probabilities"], group, *rest
        fixed = leaves["rows"], candidate, *rest
        return [
            ops.expected_quantization(*searched),
            *ops.expected_quantization_backward(grad, *searched),
            ops.fixed_quantization(*fixed),
            *ops.fixed_quantization_backward(grad, *fixed),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(2)
        together = run()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
def test_ops_are_registered_as_torch_wants() -> None:
    leaves, group, table, scale = example((0, 2, 5), dim=3, rows=6)
    values = [leaves[name] for name in ("rows", "probabilities", "alpha", "beta", "zero_rows")]
    rows, probabilities, alpha, beta, zero_rows = values
    ops = torch.ops.torchrec_mpe
    searched = rows, probabilities, group, alpha, beta, zero_rows, table, (0, 2, 5), scale
    torch.library.opcheck(ops.expected_quantization.default, searched)
    torch.library.opcheck(ops.expected_quantization.default, (*searched[:5], None, None, *searched[7:]))
    torch.library.opcheck(ops.fixed_quantization.default, (rows, group % 3, *searched[3:]))
    plain = [t.detach() if isinstance(t, Tensor) else t for t in searched]
    torch.library.opcheck(ops.expected_quantization_backward.default, (rows.detach(), *plain))
    torch.library.opcheck(ops.fixed_quantization_backward.default, (rows.detach(), plain[0], group % 3, *plain[3:]))


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
def test_compiles_into_one_graph() -> None:
    leaves, group, table, scale = example((0, 2, 5))
    args = leaves["rows"], leaves["probabilities"], group, leaves["alpha"], leaves["beta"], leaves["zero_rows"], table

    def twice(*tensors: Tensor) -> Tensor:
        return 2 * expected_quantization(*tensors, (0, 2, 5), scale)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    compare(compiled(*args), twice(*args), leaves)


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"group": torch.full((64,), 4)}, IndexError, "4 is not in 0 to 3"),
        ({"group": torch.full((64,), -1)}, IndexError, "-1 is not in 0 to 3"),
        ({"table": torch.full((64,), 3)}, IndexError, "3 is not in 0 to 2"),
        ({"table": None}, ValueError, "zero_rows need one table number a row"),
        ({"alpha": torch.ones(3, dtype=torch.float64)}, ValueError, "alpha must be"),
        ({"alpha": torch.ones(2)}, TypeError, "alpha is Float, rows Double"),
        ({"bits": (0, 9)}, ValueError, "bit-width 9 is not in 0 to 8"),
        ({"group": torch.zeros(64)}, TypeError, "expected an integer tensor"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    leaves, group, table, scale = example((0, 2))
    given_ = {**leaves, "group": group, "table": table, "bits": (0, 2), **change}
    names = ("rows", "probabilities", "group", "alpha", "beta", "zero_rows", "table", "bits")
    with pytest.raises(error, match=message):
        expected_quantization(*(given_[name] for name in names), scale)


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


def calls(leaves: dict[str, Tensor], group: Tensor, table: Tensor, scale: Tensor, bits: tuple[int, ...]):
    """Arguments of the search op and of the retraining op."""
    rest = leaves["alpha"], leaves["beta"], leaves["zero_rows"], table, bits, scale
    return {
        "expected_quantization": (leaves["rows"], leaves["probabilities"], group, *rest),
        "fixed_quantization": (leaves["rows"], group % len(bits), *rest),
    }


OPS = ["expected_quantization", "fixed_quantization"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bits", [(1, 2, 3, 4, 5, 6, 7, 8, 8), (0, 4, 4), (0, 0)])
def test_repeated_candidates_are_refused(op: str, bits: tuple[int, ...]) -> None:
    leaves, group, table, scale = example(bits)
    arguments = calls(leaves, group, table, scale, bits)[op]
    front_end = {"expected_quantization": expected_quantization, "fixed_quantization": fixed_quantization}[op]
    for run in (front_end, getattr(torch.ops.torchrec_mpe, op)):
        with pytest.raises(ValueError, match=rf"candidate bit-widths \[.*\] repeat {bits[-1]}"):
            run(*arguments)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool])
def test_other_integers_are_refused(dtype: torch.dtype) -> None:
    leaves, group, table, scale = example((0, 2))
    lines = leaves["alpha"], leaves["beta"], leaves["zero_rows"]
    with pytest.raises(TypeError, match="expected an integer tensor"):
        fixed_quantization(leaves["rows"], (group % 2).to(dtype), *lines, table, (0, 2), scale)
    with pytest.raises(TypeError, match="expected an integer tensor"):
        fixed_quantization(leaves["rows"], group % 2, *lines, table.to(dtype), (0, 2), scale)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_of_five_types(dtype: torch.dtype) -> None:
    leaves, group, table, scale = example((0, 2, 5))
    args = leaves["rows"], leaves["probabilities"], group, leaves["alpha"], leaves["beta"], leaves["zero_rows"], table
    ours = expected_quantization(*args[:2], group.to(dtype), *args[3:6], table.to(dtype), (0, 2, 5), scale)
    torch.testing.assert_close(ours, twin(*args, (0, 2, 5), scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(63, 5), (64, 4), (65, 5), (320,), ()])
def test_gradient_of_another_shape_is_refused(op: str, shape: tuple[int, ...]) -> None:
    leaves, group, table, scale = example((0, 2))
    arguments = calls(leaves, group, table, scale, (0, 2))[op]
    grad = torch.zeros(shape, dtype=torch.float64)
    kernels = triton_backend.CUDA_QUANTIZATION[f"{op}_backward"], getattr(torch.ops.torchrec_mpe, f"{op}_backward")
    for run in kernels:
        with pytest.raises(ValueError, match=r"grad must be \[64, 5\] like the output"):
            run(grad, *arguments)


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_have_shapes_and_gradients(op: str) -> None:
    leaves, group, table, scale = example((0, 2))
    arguments = [
        a.detach().to("meta").requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in calls(leaves, group, table, scale, (0, 2))[op]
    ]
    front_end = {"expected_quantization": expected_quantization, "fixed_quantization": fixed_quantization}[op]
    out = front_end(*arguments)
    assert out.device.type == "meta" and out.shape == (64, 5) and out.dtype == torch.float64
    out.sum().backward()
    for leaf in arguments:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            assert leaf.grad is not None and leaf.grad.device.type == "meta" and leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
@pytest.mark.parametrize("name", sorted(triton_backend.CUDA_QUANTIZATION))
def test_cuda_kernels_are_registered(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torchrec_mpe::{name}", "CUDA")


@pytest.mark.parametrize("backend", CPU[-1:], indirect=True)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("zero", [True, False])
def test_cuda_kernels_equal_those_of_the_cpu(op: str, zero: bool) -> None:
    """What is registered for CUDA, called with the arguments that the dispatcher passes; Triton interprets."""
    bits = (0, 2, 5)
    leaves, group, table, scale = example(bits, zero=zero)
    arguments = calls(leaves, group, table if zero else None, scale, bits)[op]
    # Lists come from the dispatcher.
    plain = [a.detach() if isinstance(a, Tensor) else list(a) if isinstance(a, tuple) else a for a in arguments]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    there = [a.to(device) if isinstance(a, Tensor) else a for a in plain]
    grad = torch.randn(64, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = triton_backend.CUDA_QUANTIZATION[op](*there)
    torch.testing.assert_close(ours.cpu(), getattr(torch.ops.torchrec_mpe, op)(*plain), rtol=1e-12, atol=1e-12)
    got = triton_backend.CUDA_QUANTIZATION[f"{op}_backward"](grad.to(device), *there)
    want = getattr(torch.ops.torchrec_mpe, f"{op}_backward")(grad, *plain)
    assert len(got) == len(want) == 6
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)
