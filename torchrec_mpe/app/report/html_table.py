"""Tables of the page."""

from collections.abc import Sequence
from html import escape


def html_table(header: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """A table of (title, unit) columns; the first cell of a row names it."""
    head = "".join(
        f'<th scope="col">{escape(title)}{f"<small>{escape(unit)}</small>" if unit else ""}</th>'
        for title, unit in header
    )
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
