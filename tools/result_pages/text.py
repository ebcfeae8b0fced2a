"""Tables and ranges of figures as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Figures = dict[str, str]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def span(values: Iterable[float], form: str = ".2f", to: str = " to ") -> str:
    """The least and the largest of some figures, or the one figure that both are in this form."""
    found = sorted(values)
    least, largest = format(found[0], form), format(found[-1], form)
    return least if least == largest else f"{least}{to}{largest}"


def machine(record: Record) -> str:
    """The hardware and software that a record names."""
    cores = f", {record['cores']} cores" if "cores" in record else ""
    software = record.get("versions", record)
    names = ("python", "torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "polars", "pyarrow", "numpy")
    versions = ", ".join(f"{name} {software[name]}" for name in names if name in software)
    return f"{record.get('cpu') or record['machine']}{cores}; {versions}"
