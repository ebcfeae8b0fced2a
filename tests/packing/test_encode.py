"""Codes of rows: nearest levels, the same whatever other rows come with them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_mpe.ops.reference.run_coding import component_bits
from torchrec_mpe.packing.encode import coded_rows, decode, encode
from torchrec_mpe.packing.table_coding import PlainRows, RowCoding, TableCoding, TransformedRows


def coding(dim: int, components: int, group: RowCoding, rows: int = 5000, seed: int = 0) -> TableCoding:
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(components + 1, dim, generator=g).half()
    encoder = torch.linalg.pinv(basis[:-1].float()) if components else torch.zeros(dim, 0)
    return TableCoding(rows, dim, (0, rows), (group,), basis, encoder)


def transformed(block_bits: tuple[int, ...], components: int, scale: float = 0.0625) -> TransformedRows:
    coding = sum(bits << 4 * block for block, bits in enumerate(block_bits))
    used = [bits for bits in component_bits(coding, components) if bits]
    return TransformedRows(
        block_bits, tuple(scale for _ in used), tuple(-scale * 2 ** (b - 1) for b in used), components
    )


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 3, 8, 16, 33, 64, 128, 256]),
    st.sampled_from([1, 2, 3, 4, 8, 16]),
    st.tuples(*[st.integers(0, 8)] * 5),
    st.integers(0, 2**16),
)
def test_codes_of_levels_come_back(dim: int, components: int, block_bits: tuple[int, ...], seed: int) -> None:
    group = transformed(block_bits, min(components, dim))
    table = coding(dim, group.components, group, seed=seed)
    g = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, 2**bits, (6,), generator=g) for bits in group.component_bits], 1).byte()
    assert torch.equal(encode(decode(codes, group, table), group, table), codes)
    for bits in range(9):
        plain = PlainRows(bits, 0.125 if bits else 0.0)
        codes = torch.randint(0, 2**bits, (6, dim), generator=g).byte()
        assert torch.equal(encode(decode(codes, plain, table), plain, table), codes)


@pytest.mark.parametrize("group", [transformed((8, 6, 5, 4, 3), 16), PlainRows(5, 0.125)])
def test_codes_do_not_depend_on_the_rows_that_come_along(group: RowCoding) -> None:
    table = coding(64, 16, group)
    rows = torch.randn(5000, 64, generator=torch.Generator().manual_seed(1))
    whole = encode(rows, group, table)
    for size in (1, 7, 1000):
        first = 300 * size
        parts = [encode(part, group, table) for part in rows[:first].split(size)]
        assert torch.equal(torch.cat(parts), whole[:first])
    assert torch.equal(encode(rows.flip(0), group, table).flip(0), whole)
    assert torch.equal(encode(rows.T.contiguous().T, group, table), whole)


def test_codes_are_those_of_the_definition_in_float64() -> None:
    group = transformed((8, 6, 5, 4, 3), 16)
    table = coding(32, 16, group)
    rows = torch.randn(200, 32, generator=torch.Generator().manual_seed(1)) * 0.3
    codes = encode(rows, group, table)
    for row in range(0, 200, 17):
        x = rows[row] - table.mean
        for k, bits in enumerate(group.component_bits):
            total = 0.0
            for d in range(32):
                total += float(x[d]) * float(table.encoder[d, k])
            level = (torch.tensor(total).float() - group.offsets[k]) / group.scales[k]
            assert int(codes[row, k]) == min(max(round(float(level)), 0), 2**bits - 1)


def test_ties_go_to_the_even_quotient_and_outliers_to_the_ends() -> None:
    group = PlainRows(3, 0.5)
    table = coding(6, 0, group)
    table.basis.zero_()
    rows = torch.tensor([[0.25, 0.75, -0.25, -0.75, 3e38, -3e38]])
    assert encode(rows, group, table).tolist() == [[4, 6, 4, 2, 7, 0]]


def test_what_is_not_finite_is_named() -> None:
    group = PlainRows(2, 1.0)
    rows = torch.zeros(5, 4)
    rows[3, 1] = torch.inf
    with pytest.raises(ValueError, match="table users: row 3 holds NaN or infinite values"):
        encode(rows, group, coding(4, 0, group), table="users")
    with pytest.raises(ValueError, match="table users: row 93 holds NaN"):
        coded_rows(rows, coding(4, 0, group), 90, table="users")


def test_rows_of_a_table_are_coded_by_their_group() -> None:
    basis = torch.tensor([[1.0, 0.5], [0.25, 0.0]]).half()
    encoder = torch.linalg.pinv(basis[:1].float())
    groups = (PlainRows(8, 0.0625), TransformedRows((1, 0, 0, 0, 0), (2.0,), (-1.0,), 1), PlainRows(0))
    order = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    table = TableCoding(4, 2, (0, 1, 3, 4), groups, basis, encoder, torch.tensor([7.0, 8.0]), order)
    rows = torch.tensor([[1.5, 0.5], [0.5, 0.5], [9.0, 9.0], [-3.0, -1.0]])
    expected = torch.tensor([[1.25, 0.5], [0.5, 0.5], [7.0, 8.0], [-0.75, -0.5]])
    assert torch.equal(coded_rows(rows, table), expected)
    assert torch.equal(torch.cat([coded_rows(rows[:1], table), coded_rows(rows[1:], table, 1)]), expected)
