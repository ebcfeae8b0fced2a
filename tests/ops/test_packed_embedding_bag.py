"""The packed lookup on every backend, against dense tables in float64."""

import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.every_backend import ALL, CPU, FAST, on
from tests.packing.random_tables import KINDS, random_tables
from torchrec_mpe.ops import library
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.packed_embedding_bag import packed_embedding_bag
from torchrec_mpe.packing.packed_tables import PackedTables


def lookup(
    packed: PackedTables,
    features: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    mean: Sequence[bool] | bool = False,
    per_sample_weights: Tensor | None = None,
    output_dtype: torch.dtype = torch.float32,
    **options: object,
) -> Tensor:
    columns = [0]
    for t in features:
        columns.append(columns[-1] + packed.tables[t].embedding_dim)
    modes = [int(mean)] * len(features) if isinstance(mean, bool) else [int(m) for m in mean]
    return packed_embedding_bag(
        *packed.tensors().values(),  # type: ignore[arg-type]
        columns,
        list(features),
        modes,
        indices,
        offsets,
        per_sample_weights,
        output_dtype,
        **options,  # type: ignore[arg-type]
    )


def by_hand(
    dense: Sequence[Tensor],
    features: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    mean: Sequence[bool],
    weights: Tensor | None,
) -> Tensor:
    """A loop over bags, in float64."""
    batch = (len(offsets) - 1) // len(features)
    columns = []
    for f, t in enumerate(features):
        bags = []
        for low, high in pairwise(offsets[f * batch : (f + 1) * batch + 1].tolist()):
            rows = dense[t][indices[low:high].long()]
            if weights is not None:
                rows = rows * weights[low:high].double().unsqueeze(1)
            bags.append(rows.sum(0) / (max(high - low, 1) if mean[f] else 1))
        columns.append(torch.stack(bags) if bags else torch.zeros(0, dense[t].shape[1], dtype=torch.float64))
    return torch.cat(columns, dim=1)


def random_bags(
    dense: Sequence[Tensor], features: Sequence[int], batch: int, longest: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    lengths = torch.randint(0, longest + 1, (len(features) * batch,), generator=g)
    ids = [torch.zeros(0, dtype=torch.int64)]
    for t, part in zip(features, lengths.view(len(features), batch), strict=True):
        ids.append(torch.randint(len(dense[t]), (int(part.sum()),), generator=g))
    return torch.cat(ids), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def check(backend: str, kinds: Sequence[Directory], dims: Sequence[int], pooling: str, seed: int, longest: int) -> None:
    g = torch.Generator().manual_seed(seed)
    packed, dense = random_tables(seed, dims, kinds, max_rows=300)
    features = torch.randint(len(dims), (len(dims) + 1,), generator=g).tolist()  # tables repeat, and may be left out
    batch = int(torch.randint(0, 5, (1,), generator=g))
    indices, offsets = random_bags(dense, features, batch, longest, g)
    weights = torch.randn(len(indices), generator=g) if pooling == "weighted" else None
    mean = [pooling == "mean" or (pooling == "mixed" and f % 2 == 1) for f in range(len(features))]
    id_dtype, offset_dtype = ((torch.int32, torch.int64)[int(bit)] for bit in torch.randint(2, (2,), generator=g))
    with on(backend):
        out = lookup(packed, features, indices.to(id_dtype), offsets.to(offset_dtype), mean, weights)
    expected = by_hand(dense, features, indices, offsets, mean, weights)
    assert out.dtype == torch.float32
    # float32 sums of up to `longest` rows, whose elements stay below 2^11.
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6 * 2**7 * max(longest, 1))


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(1, 300).filter(lambda d: d < 70 or d % 50 == 0)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["sum", "mean", "mixed", "weighted"]),
    st.integers(0, 2**16),
    st.sampled_from([0, 1, 5, 40]),
)
def test_equals_a_loop(
    backend: str, tables: list[tuple[Directory, int]], pooling: str, seed: int, longest: int
) -> None:
    check(backend, [kind for kind, _ in tables], [dim for _, dim in tables], pooling, seed, longest)


@pytest.mark.supports("lookup: every row directory, sum and weighted sum", "CPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dim", [1, 7, 8, 9, 16, 24, 32, 33, 48, 64, 72, 96, 128, 200, 256, 264])
def test_every_directory_and_dimension(backend: str, kind: Directory, dim: int) -> None:
    for pooling in ("sum", "weighted"):
        check(backend, [kind, Directory.RANKED], [dim, dim], pooling, dim + int(kind), 7)


@pytest.mark.supports("lookup: every row directory, sum and weighted sum", "Triton's interpreter")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["sum", "mixed", "weighted"])
def test_triton(kind: Directory, pooling: str) -> None:
    check("triton", [kind, kind], [16, 20], pooling, int(kind), 3)


@pytest.mark.supports("lookup: every bit-width from 0 to 8", "CPU")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("dim", [8, 16, 64, 128])
def test_one_width(backend: str, bits: int, dim: int) -> None:
    """Tables of a single width, the case that kernels treat most directly; bags longer than any internal block."""
    packed, dense = random_tables(bits, [dim], [Directory.RANKED], max_rows=200, widths=[bits])
    g = torch.Generator().manual_seed(bits)
    indices = torch.randint(len(dense[0]), (700,), generator=g)
    offsets = torch.tensor([0, 1, 1, 34, 290, 291, 700])
    with on(backend):
        out = lookup(packed, [0], indices, offsets)
    torch.testing.assert_close(out.double(), by_hand(dense, [0], indices, offsets, [False], None), rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_edges(backend: str, kind: Directory) -> None:
    packed, dense = random_tables(100 + int(kind), [16, 5], [kind, kind])
    first, last = [0, 0], [len(table) - 1 for table in dense]
    for ids in (first, last):  # ids at both bounds: the last row of the last run too
        out = on_backend(backend, packed, [0, 1], torch.tensor(ids), torch.tensor([0, 1, 2]))
        expected = torch.cat([dense[0][ids[0]], dense[1][ids[1]]])
        torch.testing.assert_close(out[0].double(), expected, rtol=1e-6, atol=1e-6)
    none = torch.zeros(0, dtype=torch.int64)
    assert on_backend(backend, packed, [0, 1], none, torch.zeros(1, dtype=torch.int64)).shape == (0, 21)
    empty_bags = on_backend(backend, packed, [0, 1], none, torch.zeros(7, dtype=torch.int64), mean=True)
    assert empty_bags.shape == (3, 21) and not empty_bags.any()


def on_backend(backend: str, *arguments: object, **options: object) -> Tensor:
    with on(backend):
        return lookup(*arguments, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ALL)
def test_one_row_and_only_0_bits(backend: str) -> None:
    for widths in ([3], [0]):
        packed, dense = random_tables(3, [12], [Directory.RANKED], max_rows=1, widths=widths)
        out = on_backend(backend, packed, [0], torch.tensor([0, 0]), torch.tensor([0, 2]))
        torch.testing.assert_close(out[0].double(), 2 * dense[0][0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shift", [1, 8, 33])
def test_unaligned_views(backend: str, shift: int) -> None:
    """Buffers that start anywhere, as slices of a file do."""
    packed, dense = random_tables(9, [16, 64, 5], [Directory.RANKED, Directory.NIBBLE, Directory.BITMAP_NIBBLE])
    moved = {}
    for name, tensor in packed.tensors().items():
        step = shift if tensor.dtype == torch.uint8 else tensor.element_size()
        buffer = torch.zeros(tensor.numel() * tensor.element_size() + step, dtype=torch.uint8)
        buffer[step:] = tensor.reshape(-1).view(torch.uint8)
        moved[name] = buffer[step:].view(tensor.dtype).view(tensor.shape)
    g = torch.Generator().manual_seed(0)
    indices, offsets = random_bags(dense, [0, 1, 2], 6, 9, g)
    ids = torch.cat([torch.zeros(1, dtype=torch.int32), indices.int()])[1:]
    out = on_backend(backend, PackedTables(packed.tables, **moved), [0, 1, 2], ids, offsets)
    torch.testing.assert_close(
        out.double(), by_hand(dense, [0, 1, 2], indices, offsets, [False] * 3, None), rtol=1e-5, atol=1e-3
    )


@pytest.mark.supports("lookup: float32, float16 and bfloat16 output", "CPU")
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_types(backend: str, dtype: torch.dtype) -> None:
    packed, dense = random_tables(4, [8, 20], [Directory.RANKED, Directory.REMAP])
    indices, offsets = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 2, 3, 4])
    expected = by_hand(dense, [0, 1], indices, offsets, [False] * 2, None)
    out = on_backend(backend, packed, [0, 1], indices, offsets, output_dtype=dtype)
    assert out.dtype == dtype
    # Rounded once, to nearest even, from a float32 result that is exact here.
    torch.testing.assert_close(out, expected.float().to(dtype), rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)


@pytest.mark.parametrize("backend", CPU)
def test_threads_do_not_change_a_bit(backend: str) -> None:
    packed, dense = random_tables(11, [16, 64, 40], [Directory.RANKED, Directory.NIBBLE, Directory.REMAP])
    indices, offsets = random_bags(dense, [0, 1, 2], 400, 12, torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(on_backend(backend, packed, [0, 1, 2], indices, offsets))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("offsets", [[0, 3], [1, 2], [0, 2, 1, 2], [0, -1, 2], [0, 9, 2]])
@pytest.mark.parametrize("backend", ALL)
def test_offsets_must_rise_to_the_ids(backend: str, offsets: list[int]) -> None:
    packed, _ = random_tables(1, [8], [Directory.RANKED])
    with pytest.raises(ValueError, match="offsets must"):
        on_backend(backend, packed, [0], torch.tensor([0, 0]), torch.tensor(offsets))


@pytest.mark.parametrize("backend", ALL)
def test_misuse(backend: str) -> None:
    packed, _ = random_tables(1, [8], [Directory.RANKED])
    indices, offsets = torch.tensor([0, 0]), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="MEAN pooling takes no per-sample weights"):
        on_backend(backend, packed, [0], indices, offsets, mean=True, per_sample_weights=torch.ones(2))
    with pytest.raises(TypeError, match="indices must be int32 or int64"):
        on_backend(backend, packed, [0], indices.float(), offsets)
    with pytest.raises(ValueError, match="feature_table_map"), on(backend):
        packed_embedding_bag(*packed.tensors().values(), [0, 8], [1], [0], indices, offsets)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch"):
        on_backend(backend, packed, [0, 0, 0], indices, offsets)
    with pytest.raises(TypeError, match="output_dtype"):
        on_backend(backend, packed, [0], indices, offsets, output_dtype=torch.int32)
    with pytest.raises(ValueError, match="per_sample_weights"):
        on_backend(backend, packed, [0], indices, offsets, per_sample_weights=torch.ones(5))


@pytest.mark.supports("a damaged directory reads nothing outside the buffers", "CPU")
@pytest.mark.parametrize("backend", CPU)
def test_a_damaged_directory_is_refused_without_reading_outside(backend: str) -> None:
    packed, dense = random_tables(2, [64], [Directory.NIBBLE])
    packed.directory[:4] = 255
    with pytest.raises(ValueError, match="table 0, feature 0: the table's directory or runs lead outside its rows"):
        ids = torch.arange(min(100, len(dense[0])))
        on_backend(backend, packed, [0], ids, torch.tensor([0, len(ids)]))


def _arguments(weighted: bool = False) -> tuple[object, ...]:
    packed, dense = random_tables(7, [16, 8], [Directory.RANKED, Directory.BITMAP_NIBBLE])
    indices, offsets = random_bags(dense, [0, 1], 4, 5, torch.Generator().manual_seed(0))
    weights = torch.ones(len(indices)) if weighted else None
    return (*packed.tensors().values(), [0, 16, 24], [0, 1], [0, 0], indices, offsets, weights, torch.float32)


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted: bool) -> None:
    arguments = _arguments(weighted)
    ops = torch.ops.torchrec_mpe
    torch.library.opcheck(ops.packed_embedding_bag.default, arguments)
    counter = torch.zeros(1, dtype=torch.int64)
    torch.library.opcheck(ops.packed_embedding_bag_counting.default, (*arguments, 1, counter))
    torch.library.opcheck(ops.packed_embedding_bag_out.default, arguments, {"out": torch.empty(4, 24)})


@pytest.mark.supports("torch.compile of the lookup", "CPU")
def test_compile_keeps_the_graph_whole() -> None:
    arguments = _arguments()
    compiled = torch.compile(packed_embedding_bag, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), packed_embedding_bag(*arguments), rtol=0, atol=0)  # type: ignore[arg-type]


def test_the_library_needs_no_python(tmp_path: Path) -> None:
    """No Python symbol, no OpenMP runtime beside torch's, and a C++ process loads it."""
    dynamic = subprocess.run(
        ["readelf", "--dynamic", "--dyn-syms", "--wide", str(library.LIBRARY)], capture_output=True, text=True
    )
    assert dynamic.returncode == 0, dynamic.stderr
    needed = [line for line in dynamic.stdout.splitlines() if "NEEDED" in line]
    assert needed and not [line for line in needed if "python" in line or "omp" in line]
    assert not [line for line in dynamic.stdout.splitlines() if " UND Py" in line or " UND _Py" in line]

    source = tmp_path / "load.cpp"
    source.write_text(
        "#include <cstdio>\n#include <dlfcn.h>\n"
        "int main(int, char** argv) {\n"
        "  if (dlopen(argv[1], RTLD_NOW) != nullptr) return 0;\n"
        "  std::puts(dlerror());\n  return 1;\n}\n"
    )
    subprocess.run(["c++", str(source), "-o", str(tmp_path / "load"), "-ldl"], check=True, timeout=60)
    loaded = subprocess.run(
        [str(tmp_path / "load"), str(library.LIBRARY)],
        env={"LD_LIBRARY_PATH": str(Path(torch.__file__).parent / "lib")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert loaded.returncode == 0, loaded.stdout


def test_without_the_library_the_reference_warns_once() -> None:
    script = (
        "import warnings, pathlib, torch, torchrec_mpe\n"
        "from torchrec_mpe.ops.quantize_and_pack import quantize_and_pack\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        quantize_and_pack(torch.zeros(1, 8), 2, torch.tensor(1.0), torch.zeros(8))\n"
        "assert len(caught) == 1, caught\n"
        "assert 'reference' in str(caught[0].message) and 'pip install' in str(caught[0].message), caught[0].message\n"
    )
    hide = "exists = pathlib.Path.exists\npathlib.Path.exists = lambda path: path.suffix != '.so' and exists(path)\n"
    hidden = f"import pathlib\n{hide}{script}"
    subprocess.run([sys.executable, "-c", hidden], check=True, timeout=120)


def test_what_the_dispatcher_calls_on_cuda() -> None:
    """It leaves out trailing arguments that have their defaults."""
    from torchrec_mpe.ops.packed_embedding_bag import _cuda, _cuda_out

    arguments = _arguments(weighted=True)
    with on("reference"):
        expected = packed_embedding_bag(*arguments)  # type: ignore[arg-type]
        half = packed_embedding_bag(*arguments[:-1], torch.float16)  # type: ignore[arg-type]
    torch.testing.assert_close(_cuda(*arguments[:-1]), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(_cuda(*arguments[:-1], torch.float16, 1), half, rtol=1e-2, atol=1e-2)
    out = torch.empty_like(expected)
    _cuda_out(*arguments[:-1], out=out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


def test_float64_and_gradients() -> None:
    *arguments, weights, _ = _arguments(weighted=True)
    assert isinstance(weights, Tensor)
    exact = packed_embedding_bag(*arguments, weights, torch.float64)  # type: ignore[arg-type]
    assert exact.dtype == torch.float64
    with pytest.raises(TypeError, match="output_dtype must be float32, float16 or bfloat16"):
        packed_embedding_bag(*arguments, weights, torch.float64, backend="cpu")  # type: ignore[arg-type]
    assert not packed_embedding_bag(*arguments, weights.requires_grad_()).requires_grad  # type: ignore[arg-type]


def test_compiling_heeds_the_chosen_backend() -> None:
    compiled = torch.compile(packed_embedding_bag, backend="eager")
    arguments = _arguments()
    with on("reference"):
        explanation = torch._dynamo.explain(packed_embedding_bag)(*arguments)
    assert "torchrec_mpe.packed_embedding_bag" not in str([graph.code for graph in explanation.graphs])
    torch.testing.assert_close(compiled(*arguments), packed_embedding_bag(*arguments), rtol=0, atol=0)  # type: ignore[arg-type]
