"""A coding of trained tables for a number of bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from torchrec_mpe.coding.allocation import allocate
from torchrec_mpe.coding.candidates import GroupChoice, TableCandidates, TableChoice, joined
from torchrec_mpe.coding.owned_rows import TableToCode
from torchrec_mpe.files.progress import progress_bar
from torchrec_mpe.ops.reference.run_coding import MAX_COMPONENTS
from torchrec_mpe.packing.table_coding import PlainRows, RowCoding, TableCoding

_SMALL_DIM = 32
_FEW_COMPONENTS = 8


@dataclass(frozen=True)
class TableSummary:
    """What became of a table.

    Attributes:
        components (int): K.
        energy (tuple[float, ...]): by component, the first 16, the part of the rows' deviation from their mean that
            it holds, as the loss weighs it; adds up to 1 over all D.
        plain_rows (int): rows coded plain, in 1 to 8 bits an element.
        transformed_rows (int): rows coded in components.
        unseen_rows (int): rows without lookups.
        zero_rows (int): rows with lookups that read the zero row all the same.
        error (float): expected, ``sum of weight * (row - coded)^T curvature (row - coded)`` over rows.
        deviation (float): what it would be if all rows with lookups read the mean.
    """

    components: int
    energy: tuple[float, ...]
    plain_rows: int
    transformed_rows: int
    unseen_rows: int
    zero_rows: int
    error: float
    deviation: float


@dataclass(frozen=True)
class CodedTable:
    """A table's coding, and a summary of it."""

    coding: TableCoding
    summary: TableSummary


def code_tables(
    tables: Sequence[TableToCode],
    bytes: int,
    *,
    reserved: int = 0,
    max_components: int | None = None,
    progress: bool = False,
) -> dict[str, CodedTable]:
    """Choose how to code every row of some tables, to the least expected loss in a number of bytes.

    Rows are read once, and a sample of them again. Each group of rows of similar counts becomes plain or transformed,
    with widths by the error that they leave in the metric of the loss. Tables share the bytes: a table that the loss
    hardly sees gets few.

    Args:
        tables (Sequence[TableToCode]): of one collection, in its order; on every rank the same ones.
        bytes (int): of the collection, with all metadata.
        reserved (int): of these, for what is not this collection.
        max_components (Optional[int]): K of a table at most; None: 16 up to a dimension of 32, else 8, which keeps
            the product of components and basis small beside the lookup.
        progress (bool): show a progress bar.

    Returns:
        Dict[str, CodedTable]: by table, at most ``bytes`` together, and not more than 1% or 64 bytes below, unless more
            bits lower no error.

    Raises:
        ValueError: naming the table, for rows, counts or curvature that cannot be; or naming the bytes needed, for a
            budget that is too small.

    Example::

        found = code_tables([TableToCode("t", 1000, 16, counts, curvature, WholeTable(weight))], bytes=2000)
        found["t"].coding.groups, found["t"].summary.error
    """
    names = [table.name for table in tables]
    if not tables or len(set(names)) < len(names):
        raise ValueError(f"there must be tables, each with a name of its own, got {names}")
    if max_components is not None and not 0 <= max_components <= MAX_COMPONENTS:
        raise ValueError(f"max_components must lie between 0 and {MAX_COMPONENTS}, got {max_components}")
    candidates = []
    for table in progress_bar(tables, desc="measuring tables", unit="table", disable=not progress):
        default = MAX_COMPONENTS if table.embedding_dim <= _SMALL_DIM else _FEW_COMPONENTS
        candidates.append(TableCandidates(table, default if max_components is None else max_components))
    choices = allocate(candidates, bytes, reserved)
    return {c.name: _coded_table(c, choice) for c, choice in zip(candidates, choices, strict=True)}


def _coded_table(table: TableCandidates, choice: TableChoice) -> CodedTable:
    groups = joined(choice.groups)
    codings: list[RowCoding] = [group.coding(choice.components) for group in groups]
    bounds = [0, *(group.stop for group in groups)]
    unseen, empty = table.rows - table.seen, PlainRows(0)
    if unseen and codings and codings[-1] == empty:
        bounds[-1] = table.rows
    elif unseen:
        codings.append(empty)
        bounds.append(table.rows)
    transform, kept = table.transform, choice.components
    coding = TableCoding(
        table.rows,
        table.dim,
        tuple(bounds),
        tuple(codings),
        basis=torch.cat([transform.basis[:kept], transform.mean.unsqueeze(0)]),
        encoder=transform.encoder[:, :kept].contiguous(),
        zero_row=table.zero_row if empty in codings else None,
        order=table.order,
    )
    summary = TableSummary(
        kept,
        tuple(transform.energy[:MAX_COMPONENTS].tolist()),
        plain_rows=_rows(g for g in groups if g.plain_bits),
        transformed_rows=_rows(g for g in groups if g.plain_bits is None),
        unseen_rows=unseen,
        zero_rows=_rows(g for g in groups if g.plain_bits == 0),
        error=choice.error,
        deviation=sum(g.levels.energy for g in table.groups),
    )
    return CodedTable(coding, summary)


def _rows(groups: Iterable[GroupChoice]) -> int:
    return sum(group.rows for group in groups)
