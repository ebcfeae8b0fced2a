"""The packed lookup of coded tables on every instruction set, against the reference in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.every_backend import CPU, on
from tests.packing.random_codings import coded_table, random_coding
from torchrec_mpe.ops.packed_embedding_bag import packed_embedding_bag
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.packing.packed_tables import PackedTables

DIMS = [1, 3, 8, 16, 33, 64, 128, 256]


def uncoded(name: str, rows: int, dim: int, g: torch.Generator) -> TableToPack:
    values = torch.randn(rows, dim, generator=g)
    widths = (
        TableBitWidths(rows, dim, (0, rows // 2, rows), (6, 1)) if rows > 1 else TableBitWidths(1, dim, (0, 1), (3,))
    )
    alpha = torch.tensor([0.0, *(2.0 / 2**bits for bits in range(1, 9))])
    return TableToPack(name, widths, lambda start, stop: values[start:stop], alpha, torch.randn(dim, generator=g))


def lookup(packed: PackedTables, ids: Tensor, offsets: Tensor, weights: Tensor | None, **options: object) -> Tensor:
    """Every table once; even ones by their mean if there are no weights."""
    columns = [0]
    for table in packed.tables:
        columns.append(columns[-1] + table.embedding_dim)
    tables = len(packed.tables)
    return packed_embedding_bag(
        **packed.tensors(),
        D_offsets=columns,
        feature_table_map=list(range(tables)),
        pooling_mode=[int(weights is None and t % 2 == 0) for t in range(tables)],
        indices=ids,
        offsets=offsets,
        per_sample_weights=weights,
        **options,  # type: ignore[arg-type]
    )


def bags(packed: PackedTables, batch: int, longest: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids from -1, a pruned row, on."""
    lengths = torch.randint(0, longest + 1, (len(packed.tables) * batch,), generator=g)
    ids = [
        torch.randint(-1, table.num_embeddings, (int(part.sum()),), generator=g)
        for table, part in zip(packed.tables, lengths.view(-1, batch), strict=True)
    ]
    return torch.cat(ids), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def check(packed: PackedTables, longest: int, weighted: bool, wide: bool, g: torch.Generator) -> None:
    ids, offsets = bags(packed, 4, longest, g)
    weights = torch.randn(len(ids), generator=g) if weighted else None
    ids, offsets = (ids, offsets.int()) if wide else (ids.int(), offsets)
    exact = lookup(packed, ids, offsets, weights, output_dtype=torch.float64, backend="reference")
    for backend in CPU:
        with on(backend):
            for dtype, rtol in ((torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
                out = lookup(packed, ids, offsets, weights, output_dtype=dtype)
                # float32 sums of up to `longest` rows, whose elements stay below 2^8.
                torch.testing.assert_close(
                    out.double(), exact, rtol=rtol, atol=2e-6 * 2**5 * max(longest, 1) + rtol * (rtol > 1e-4)
                )


@pytest.mark.supports("lookup: coded tables, sum, mean and weighted sum", "CPU")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tables=st.lists(
        st.tuples(
            st.sampled_from(DIMS),
            st.sampled_from([0, 1, 2, 4, 8, 16]),
            st.one_of(st.integers(1, 3), st.integers(4, 400)),
            st.sampled_from(["ranked", "remap", "wavelet", "uncoded"]),
        ),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 10**6),
    longest=st.sampled_from([1, 5, 40, 300]),
    weighted=st.booleans(),
    wide=st.booleans(),
)
def test_equals_the_reference(
    tables: list[tuple[int, int, int, str]], seed: int, longest: int, weighted: bool, wide: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    packed = pack_tables(
        [
            uncoded(f"t{t}", rows, dim, g)
            if kind == "uncoded"
            else coded_table(
                f"t{t}",
                *random_coding(seed + t, rows, dim, min(components, dim), remap=kind != "ranked"),
                directory="remap" if kind == "remap" else "auto",
            )
            for t, (dim, components, rows, kind) in enumerate(tables)
        ]
    )
    check(packed, longest, weighted, wide, g)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("components", [0, 1, 2, 4, 8, 16])
def test_every_dimension_and_number_of_components(dim: int, components: int) -> None:
    for seed, rows in enumerate((1, 12, 500)):
        g = torch.Generator().manual_seed(seed)
        coding = random_coding(100 * dim + components + seed, rows, dim, min(components, dim))
        check(pack_tables([coded_table("t", *coding)]), 30, seed == 1, seed == 2, g)


@pytest.mark.parametrize("bits", range(9))
def test_one_width(bits: int) -> None:
    for dim, components in ((16, 16), (64, 8), (33, 4)):
        g = torch.Generator().manual_seed(bits)
        coding = random_coding(bits, 90, dim, components, widths=[bits])
        check(pack_tables([coded_table("t", *coding)]), 140, False, True, g)


@pytest.mark.parametrize("backend", CPU)
def test_threads_do_not_change_a_bit(backend: str) -> None:
    tables = [
        random_coding(t, 500, dim, components) for t, (dim, components) in enumerate(((16, 16), (64, 8), (40, 5)))
    ]
    packed = pack_tables([coded_table(f"t{t}", *table) for t, table in enumerate(tables)])
    ids, offsets = bags(packed, 400, 12, torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with on(backend):
                results.append(lookup(packed, ids, offsets, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.supports("damaged records or levels read nothing outside the buffers", "CPU")
@pytest.mark.parametrize("backend", CPU)
def test_damage_is_refused(backend: str) -> None:
    packed = pack_tables([coded_table("t", *random_coding(3, 200, 16, 16))])
    ids, offsets = torch.arange(200), torch.tensor([0, 200])
    tensors = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    damage = {
        "run_records": (tensors["run_records"] + (1 << 40), "the table's directory or runs lead outside its rows"),
        "levels": (tensors["levels"][:1], "the table's directory or runs lead outside its rows"),
        "bases": (tensors["bases"][:-1], "table 0: the basis of its 16 components from 0 on leaves the 271 elements"),
        "bases_offsets": (torch.tensor([1], dtype=torch.int32), "table 0: the basis of its 16 components from 1 on"),
        "levels_offsets": (torch.tensor([-1], dtype=torch.int32), "table 0: levels offset -1 of"),
        "components": (torch.tensor([17], dtype=torch.int32), "table 0: it cannot have 17 components"),
        "directory_kinds": (torch.tensor([4], dtype=torch.int32), "table 0:"),
    }
    for name, (value, message) in damage.items():
        with pytest.raises(ValueError, match=message), on(backend):
            lookup(PackedTables(packed.tables, **{**tensors, name: value}), ids, offsets, None)
