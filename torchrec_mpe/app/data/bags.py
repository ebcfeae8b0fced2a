"""Cells with several ids: split at a separator, read as JSON, or lists already; and cells that only look like ids."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import polars as pl

JSON = "json"
"""The separator of a field whose cells are JSON lists."""

_WEIGHT = r":-?(\d+\.\d*|\.\d+|\d+(\.\d*)?[eE]-?\d+)"
_WEIGHTED_BAG = rf"^[^:]+{_WEIGHT}([|;, ][^:]+:-?[\d.]+([eE]-?\d+)?)+$"


def bag_lists(cells: pl.Series, separator: str | None, reject: Callable[[pl.Series, str], None]) -> pl.Series:
    """The ids of each cell, List(String) [n] without empty texts.

    Args:
        cells: String [n], or List(String) where the file has lists.
        separator: between ids, or ``JSON``.
        reject: raises the error for the first cell where its Boolean series is false.
    """
    if cells.dtype == pl.String:
        cells = _json_lists(cells, reject) if separator == JSON else cells.str.split(separator or "")
    lists: pl.Series = cells.list.eval(pl.element().filter(pl.element() != ""))
    return lists


def _json_lists(cells: pl.Series, reject: Callable[[pl.Series, str], None]) -> pl.Series:
    lists: list[list[str] | None] = []
    for cell in cells:
        ids: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            ids = json.loads(cell) if cell.strip() else []
        good = isinstance(ids, list) and all(type(value) in (str, int) for value in ids)
        lists.append([str(value) for value in ids] if good else None)
    series = pl.Series(cells.name, lists, dtype=pl.List(pl.String))
    reject(series.is_not_null(), "is no JSON list of texts or whole numbers: mend the line")
    return series


def looks_unread(cells: pl.Series, is_bag: bool) -> str | None:
    """What texts that would be taken for single ids seem to be, with advice; None if they are ids.

    Args:
        cells: String [n], of a field without a separator, or the values of its bags.
        is_bag: whether they are values of bags.
    """
    cells = cells.filter(cells != "")
    if cells.is_empty():
        return None
    if is_bag:
        weighted = cells.str.contains(r"^[^:]+:-?[\d.]+([eE]-?\d+)?$").all() and cells.str.contains(f"{_WEIGHT}$").any()
    else:
        if cells.str.contains(r"^\s*\[.*\]\s*$").all() and cells.str.contains(",", literal=True).any():
            return "holds lists: with --separator json JSON lists are read as several ids"
        weighted = cells.str.contains(_WEIGHTED_BAG).any() and cells.str.contains(r"^[^:]+:-?[\d.eE-]+").all()
    if weighted:
        return "holds ids with weights, which are not read: write the ids without the weights"
    return None
