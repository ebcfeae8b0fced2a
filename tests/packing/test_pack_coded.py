"""Coded tables: bytes by hand, and what the reference reads back."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.packing.random_codings import coded_table, random_coding
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.packed_embedding_bag import packed_embedding_bag
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.layout import END_PADDING
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.size import packed_bytes, size_report
from torchrec_mpe.packing.table_coding import PlainRows, TableCoding, TransformedRows
from torchrec_mpe.packing.validate import validate_packed_tables


def read_all(packed: PackedTables, t: int) -> Tensor:
    """Every row of a table as the reference reads it, float64 [rows, D]."""
    table = packed.tables[t]
    return packed_embedding_bag(
        **packed.tensors(),
        D_offsets=[0, table.embedding_dim],
        feature_table_map=[t],
        pooling_mode=[0],
        indices=torch.arange(table.num_embeddings),
        offsets=torch.arange(table.num_embeddings + 1),
        output_dtype=torch.float64,
        backend="reference",
    )


def by_hand() -> tuple[TableCoding, Tensor]:
    """D = 8, K = 2: two plain rows of 3 bits, three of 3 and 2 bits, two of 1 and 0 bits, two that were not seen."""
    basis = torch.zeros(3, 8)
    basis[0, 0], basis[1, 1], basis[2] = 1, 1, 0.5
    groups = (
        PlainRows(3, 0.25),
        TransformedRows((3, 2, 0, 0, 0), (0.5, 0.25), (-1.0, 0.0), 2),
        TransformedRows((1, 0, 0, 0, 0), (2.0,), (-1.0,), 2),
        PlainRows(0),
    )
    coding = TableCoding(9, 8, (0, 2, 5, 7, 9), groups, basis.half(), basis[:2].T.contiguous(), torch.full((8,), 9.0))
    rows = torch.full((9, 8), 0.5)
    rows[0] += 0.25 * torch.arange(-4, 4)
    rows[1] += 0.25 * torch.arange(3, -5, -1)
    rows[2:5, 0] += torch.tensor([-1.0, 0.5, 2.5])  # codes 0, 3, 7
    rows[2:5, 1] += torch.tensor([0.75, 0.0, 0.25])  # codes 3, 0, 1
    rows[5:7, 0] += torch.tensor([1.0, -1.0])  # codes 1, 0
    rows[7:] = 9.0
    return coding, rows


def test_bytes_by_hand() -> None:
    """The plain rows take 2 * 3 bytes. Then come, from bit 48 on, 0 3 | 3 0 | 7 1 in 3 and 2 bits, and 1 | 0."""
    coding, rows = by_hand()
    packed = pack_tables([coded_table("t", coding, rows)])
    bits = "".join(f"{byte:08b}"[::-1] for byte in packed.weights.tolist())
    codes = [*range(8), *range(7, -1, -1)]
    assert bits[:48] == "".join(f"{code:03b}"[::-1] for code in codes)
    assert bits[48:65] == "00011110001111010"
    assert not any(bit == "1" for bit in bits[65:]) and packed.weights.numel() == 64 + END_PADDING
    flag = -(1 << 63)
    assert packed.run_records.tolist() == [
        [0, 24 | 3 << 32],
        [48 - 2 * 5, (5 | 0x23 << 32) + flag],
        [63 - 5, (1 | 1 << 32) + flag],
        [0, 0],
    ]
    assert packed.levels.tolist() == [0.25, 0.5, -1.0, 0.25, 0.0, 2.0, -1.0]
    assert packed.bases.view(3, 8)[:, :3].tolist() == [[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0.5]]
    assert (packed.scale_index.tolist(), packed.components.tolist(), packed.alpha.numel()) == ([-1], [2], 0)
    assert torch.equal(read_all(packed, 0), rows.double())


def test_bytes_are_all_counted() -> None:
    """9 payload bytes: 2 * 24 + 3 * 5 + 2 bits. Levels 14, basis and mean 48, and three offsets."""
    coding, rows = by_hand()
    packed = pack_tables([coded_table("t", coding, rows)])
    report = size_report(packed)
    assert report == packed_bytes({"t": coding}) and report.total == packed.nbytes
    assert (report.payload, report.transform, report.scales, report.zero_rows) == (9, 14 + 48 + 12, 4, 36)
    assert report.tables[0].rows_per_width == (2, 0, 0, 2, 0, 0, 0, 0, 0)
    assert size_report(packed, [report.tables[0].rows_per_width]) == report
    with pytest.raises(ValueError, match=r"table t: it has .* other bit-widths than the declared"):
        size_report(packed, [(1, 0, 0, 2, 0, 0, 0, 0, 0)])


@settings(deadline=None)  # a first call may compile or load
@given(
    seed=st.integers(0, 10**6),
    dim=st.sampled_from([1, 3, 8, 16, 33, 64, 128, 256]),
    components=st.sampled_from([0, 1, 2, 4, 5, 8, 16]),
    rows=st.one_of(st.integers(1, 3), st.integers(1, 120), st.integers(500, 1500)),
    directory=st.sampled_from(["ranked", "remap", "auto"]),
    piece=st.sampled_from([1, 7, 1000]),
)
def test_every_row_comes_back(seed: int, dim: int, components: int, rows: int, directory: str, piece: int) -> None:
    piece = max(piece, rows // 20)
    coding, values = random_coding(seed, rows, dim, min(components, dim), remap=directory != "ranked")
    packed = pack_tables([coded_table("t", coding, values, piece, directory)])
    validate_packed_tables(packed)
    assert size_report(packed) == packed_bytes({"t": coding}, directory=directory)
    assert size_report(packed).total == packed.nbytes
    assert torch.equal(read_all(packed, 0), values)
    [kind] = packed.directory_kinds.tolist()
    assert packed.layouts()[0].directory == kind
    if directory == "auto":
        ids_are_ranks = pack_tables([coded_table("t", dataclasses.replace(coding, order=None), values)])
        groups, payload = len(coding.groups), size_report(ids_are_ranks).payload
        assert (kind == Directory.RANKED) == (groups == 1) and size_report(packed).payload == payload
        assert size_report(packed).total <= packed_bytes({"t": coding}, directory="remap").total
    else:
        assert kind == (Directory.REMAP if directory == "remap" else Directory.RANKED)


def test_coded_and_plain_tables_side_by_side() -> None:
    codings = [random_coding(k, 50, 16, 4 * k, remap=k == 2) for k in range(4)]
    tables = [coded_table(f"c{k}", *coding) for k, coding in enumerate(codings)]
    ints = torch.arange(160.0).view(20, 8) % 8 - 4
    alpha = torch.tensor([0.0, *(2.0**k for k in range(7, -1, -1))])
    widths = TableBitWidths(20, 8, (0, 20), (8,))
    plain = TableToPack("p", widths, lambda start, stop: ints[start:stop], alpha, torch.zeros(8))
    packed = pack_tables([tables[0], tables[1], plain, *tables[2:]])
    validate_packed_tables(packed)
    assert size_report(packed).total == packed.nbytes
    for t, values in enumerate([codings[0][1], codings[1][1], ints.double(), codings[2][1], codings[3][1]]):
        assert torch.equal(read_all(packed, t), values)
    assert packed.scale_index.tolist() == [-1, -1, 0, -1, -1] and packed.weights_offsets[2] % 64 == 0


def test_rows_of_several_processes_are_put_together() -> None:
    """Each has every third row; what they have set is added."""
    coding, values = random_coding(3, 90, 8, 8)
    whole = pack_tables([coded_table("t", coding, values)])
    parts = [
        pack_tables(
            [
                dataclasses.replace(
                    coded_table("t", coding, values),
                    pieces=lambda first=first: ((k, values[k : k + 1].float()) for k in range(first, 90, 3)),
                )
            ]
        )
        for first in range(3)
    ]
    assert torch.equal(sum(part.weights.int() for part in parts), whole.weights.int())
    added: list[Tensor] = []

    def add(weights: Tensor) -> Tensor:
        added.append(weights)
        return parts[1].weights[: weights.numel()] + parts[2].weights[: weights.numel()] + weights

    first = dataclasses.replace(
        coded_table("t", coding, values),
        pieces=lambda: ((k, values[k : k + 1].float()) for k in range(0, 90, 3)),
        sum_over_ranks=add,
    )
    assert torch.equal(pack_tables([first]).weights, whole.weights) and len(added) == 1


@pytest.mark.parametrize("piece", [1, 64])
def test_rows_with_nan_are_named(piece: int) -> None:
    coding, rows = by_hand()
    rows[4, 1] = float("nan")
    with pytest.raises(ValueError, match="table t: row 4 holds NaN"):
        pack_tables([coded_table("t", coding, rows, piece)])


def test_rows_of_another_shape() -> None:
    coding, rows = by_hand()
    with pytest.raises(ValueError, match=r"table t: rows from 0 on must be float32 \[n, 8\] of its 9 rows"):
        pack_tables([coded_table("t", coding, rows[:, :7])])
    with pytest.raises(ValueError, match="table t: rows from 0 on must be"):
        pack_tables([coded_table("t", coding, torch.cat([rows, rows]))])


def test_directories_that_cannot_serve_coded_rows() -> None:
    coding, rows = by_hand()
    table = coded_table("t", coding, rows)
    with pytest.raises(ValueError, match=r"table t is transform-coded .* its directory is ranked, not 'nibble'"):
        pack_tables([dataclasses.replace(table, directory="nibble")])


WRONG = {
    "scale index": ("scale_index", 0, 0, "table t: basis offset 0, levels offset 0 and scale_index 0"),
    "components": ("components", 0, 17, "table t: it cannot have 17 components"),
    "basis offset": ("bases_offsets", 0, 1, "table t: basis offset 1 leaves its buffer"),
    "levels offset": ("levels_offsets", 0, 1, "table t: levels offset 1 leaves its buffer"),
    "step size": ("levels", 0, 0.0, "table t: the step size of the run at rank 0 must be positive"),
    "not a level": ("levels", 2, float("nan"), "levels must be finite"),
    "not a basis": ("bases", 2, float("inf"), "bases must be finite"),
    "row bits": ("run_records", (1, 1), (6 | 0x23 << 32) - (1 << 63), "table t: rows of 8 elements .* take 5 bits"),
    "width of 9": ("run_records", (1, 1), (11 | 0x29 << 32) - (1 << 63), "table t: run_records must have bit-widths"),
    "other bits": ("run_records", (1, 1), (5 | 0x40000023 << 32) - (1 << 63), "table t: run_records must have bit-w"),
    "run too early": ("run_records", (1, 0), 37, "table t: the run at rank 2 lies at bits 47"),
    "plain run askew": ("run_records", (0, 0), 8, "table t: the run at rank 0 lies at bits 8"),
    "run beyond": ("run_records", (2, 0), 600, "table t: the run at rank 5 lies at bits"),
}


@pytest.mark.parametrize("what", WRONG)
def test_damaged_coded_tables_are_refused(what: str) -> None:
    name, place, value, message = WRONG[what]
    packed = pack_tables([coded_table("t", *by_hand())])
    tensors = {key: tensor.clone() for key, tensor in packed.tensors().items()}
    tensors[name][place] = value
    with pytest.raises(ValueError, match=message):
        validate_packed_tables(PackedTables(packed.tables, **tensors))
