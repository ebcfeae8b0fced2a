"""Which tables take the bytes of a coded model, and which of them the loss sees."""

from collections.abc import Mapping

from torchrec_mpe.app.report.data import CodedTable, ReportData
from torchrec_mpe.app.report.html_table import html_table
from torchrec_mpe.app.report.numerals import MISSING, decimal, in_bytes

_HEADER = [
    ("Method and table", ""),
    ("Rows", ""),
    ("Components", "of all"),
    ("Energy", "that they hold"),
    ("Plain", "rows"),
    ("Transformed", "rows"),
    ("Without bits", "rows"),
    ("Size", "as stored"),
    ("Bytes", "share"),
    ("Seen by the loss", "share"),
    ("Lost", "of that"),
]


def coded_tables(report: ReportData) -> str:
    """A line per coded method and table, of the first seed; empty without coded tables."""
    lines = [line for method, tables in report.codings.items() if tables for line in _lines(method, tables)]
    if not lines:
        return ""
    return (
        "<h2>Coded tables</h2>\n<p>Energy is the part of the rows' deviation from their mean, as the loss weighs it, "
        "that the components hold. What the loss sees of a table is what it would lose if all rows read the mean; the "
        "last column is the part of it that coding is expected to lose, before the dense network adapts.</p>\n"
        + html_table(_HEADER, lines)
    )


def _lines(method: str, tables: Mapping[str, CodedTable]) -> list[list[str]]:
    total = sum(table.bytes for table in tables.values())
    seen = sum(table.summary.deviation for table in tables.values())
    lost = sum(table.summary.error for table in tables.values())
    rows = sum(table.layout.num_embeddings for table in tables.values())
    lines = [[method, f"{rows:,}", *[""] * 5, in_bytes(total), "", "", _share(lost, seen)]]
    for name, table in tables.items():
        summary = table.summary
        energy = decimal(100 * sum(summary.energy[: summary.components]), 1) + "%" if summary.components else MISSING
        lines.append(
            [
                f"{method}, {name}",
                f"{table.layout.num_embeddings:,}",
                f"{summary.components} of {table.layout.embedding_dim}",
                energy,
                f"{summary.plain_rows:,}",
                f"{summary.transformed_rows:,}",
                f"{summary.unseen_rows + summary.zero_rows:,}",
                in_bytes(table.bytes),
                _share(table.bytes, total),
                _share(summary.deviation, seen),
                _share(summary.error, summary.deviation),
            ]
        )
    return lines


def _share(part: float, whole: float) -> str:
    return decimal(100 * part / whole, 1) + "%" if whole else MISSING
