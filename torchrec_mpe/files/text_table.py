"""Tables in plain text."""

from collections.abc import Sequence


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to equal width: the first to the left, the others to the right.

    Example::

        text_table([["table", "rows"], ["t", "1,000"]])   # "table   rows\\nt      1,000"
    """
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
