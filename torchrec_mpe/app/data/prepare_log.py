"""Prepare a log for training: count its values, give them ids, split its rows, write it all as arrays."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
from tqdm import tqdm

from torchrec_mpe.app.data.coded_log import CodedLog, code_log
from torchrec_mpe.app.data.dataset import FORMAT_VERSION, PreparedDataset
from torchrec_mpe.app.data.log import Log, criteo_log, csv_log
from torchrec_mpe.app.data.split import SPLITS, SplitKind, assign_splits, check_split
from torchrec_mpe.app.data.split_writer import count_training_values, write_splits
from torchrec_mpe.app.data.vocabulary import build_vocabulary
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.atomic import atomic_directory
from torchrec_mpe.upstream.versions import __version__


def prepare_criteo(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    min_count: int = 2,
    split: SplitKind = "random",
    seed: int = 0,
    progress: bool = True,
) -> PreparedDataset:
    """Prepare a log in Criteo's format: label, 13 numbers I1..I13, 26 categories C1..C26, tab-separated, no header.

    An empty cell is missing, which is a value of its own. Numbers become categories (``floor(ln(v)^2)`` for v > 2,
    otherwise v) and dense features (``log1p(max(v, 0))``, 0 where missing). A column that holds one single value is
    left out; ``notes`` of the result says which.

    Args:
        path: the log, plain or gzip.
        out: a folder that does not exist yet or is empty; it appears complete or not at all.
        min_count: values seen fewer times in training rows share one id a field. At least 1.
        split: "random" or "chronological" (in file order), 8:1:1.
        seed: of the random split. At least 0.
        progress: whether to show progress bars.

    Raises:
        UserError: if the log cannot be read, a cell is not what it should be (with its line number), or an option is
            wrong.
        OSError: if the disk is full or cannot be written; nothing is left behind.
    """
    log = criteo_log(Path(path))
    return prepare_log(log, Path(out), min_count=min_count, split=split, seed=seed, progress=progress)


def prepare_csv(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    label: str,
    fields: Sequence[str],
    positive: str | None = None,
    numbers: Sequence[str] = (),
    separators: Mapping[str, str] | str = {},
    time: str | None = None,
    min_count: int = 2,
    split: SplitKind = "random",
    seed: int = 0,
    progress: bool = True,
) -> PreparedDataset:
    """Prepare a CSV log with a header line.

    Args:
        path: the log, plain or gzip, UTF-8, comma-separated.
        out: a folder that does not exist yet or is empty; it appears complete or not at all.
        label: the label's column.
        fields: the columns of ids, in the order of the prepared fields.
        positive: which labels are positive, such as ">=5", "==1" or "4" (the same as "==4"); None if they are 0 and 1.
        numbers: the columns of numbers, which become fields after ``fields`` and dense features, as in
            :func:`prepare_criteo`.
        separators: for fields with several values in a cell, the text between the values; one text is for all
            ``fields``. An empty cell is an empty bag there, while in the other fields it is a value of its own.
        time: for a chronological split, a column of numbers or ISO dates that orders the rows; None for file order.
            Rows keep the file's order inside each part of the split.
        min_count: values seen fewer times in training rows share one id a field. At least 1.
        split: "random" or "chronological", 8:1:1.
        seed: of the random split. At least 0.
        progress: whether to show progress bars.

    Raises:
        UserError: if the log cannot be read, a column is missing, a cell is not what it should be (with its line
            number), or an option is wrong.
        OSError: if the disk is full or cannot be written; nothing is left behind.
    """
    log = csv_log(
        Path(path),
        label=label,
        fields=fields,
        positive=positive,
        numbers=numbers,
        separators=separators,
        time=time,
    )
    return prepare_log(log, Path(out), min_count=min_count, split=split, seed=seed, progress=progress)


def prepare_log(log: Log, out: Path, *, min_count: int, split: SplitKind, seed: int, progress: bool) -> PreparedDataset:
    """Prepare a log of any format, as :func:`prepare_csv` does.

    Raises:
        UserError: if the log cannot be read, a cell is not what it should be (with its line number), or an option is
            wrong.
        OSError: if the disk is full or cannot be written; nothing is left behind.
    """
    check_split(split, seed, log.time)
    if min_count < 1:
        raise UserError(f"min_count is {min_count}: give 1 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not an empty folder: choose another or remove it")
    with atomic_directory(out) as folder:
        coded = code_log(log, folder / "coded", progress=progress)
        manifest = _write(coded, folder, min_count, split, seed, progress)
        shutil.rmtree(coded.folder)
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")
    return PreparedDataset.open(out)


def _write(
    coded: CodedLog, folder: Path, min_count: int, split: SplitKind, seed: int, progress: bool
) -> dict[str, Any]:
    """Write everything but the manifest, and return the manifest."""
    log = coded.log
    splits = assign_splits(split, coded.rows, seed, coded.times)
    _check_rows(coded, splits)
    counts = count_training_values(coded, splits, progress=progress)

    (folder / "vocabulary").mkdir()
    fields: list[dict[str, Any]] = []
    dropped: list[dict[str, str]] = []
    ids: dict[int, npt.NDArray[np.int32]] = {}
    some_id = False
    columns = tqdm(log.columns, unit="field", desc="ordering", disable=not progress)
    for index, column in enumerate(columns):
        values = coded.dictionaries[index].take_values()
        some_id |= bool((values != "").any())
        reason = coded.constant(index)
        if reason is None:
            vocabulary = build_vocabulary(values, counts[index], min_count)
            if vocabulary.size == 1:
                reason = f"has no value that is seen {min_count} times in training rows"
        if reason is not None:
            dropped.append({"name": column.name, "as": "field", "reason": reason})
            continue
        ids[index] = vocabulary.ids
        file = f"vocabulary/{len(fields)}.parquet"
        pyarrow.parquet.write_table(vocabulary.table.to_arrow(), folder / file)
        fields.append(
            {
                "name": column.name,
                "num_embeddings": vocabulary.size,
                "shared_id": vocabulary.shared_id,
                "multi_valued": column.kind == "bag",
                "number": column.kind == "number",
                "separator": column.separator,
                "vocabulary": file,
            }
        )
    names = ", ".join(column.name for column in log.columns)
    if not some_id:
        raise UserError(
            f"{log.path} holds no ids: columns {names} are empty in every row: name columns that have values"
        )
    if not fields:
        raise UserError(f"{log.path} has no field to learn from: {dropped[0]['name']} {dropped[0]['reason']}")

    dense = np.flatnonzero(coded.dense_bounds[:, 0] < coded.dense_bounds[:, 1]).tolist()
    for index, name in enumerate(log.numbers):
        if index not in dense:
            dropped.append({"name": name, "as": "dense feature", "reason": "holds one single value in the whole file"})
    write_splits(coded, folder, splits, ids, dense, progress=progress)
    return {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "source": {
            "path": str(log.path),
            "format": log.format,
            "bytes": log.path.stat().st_size,
            "rows": coded.rows,
            "values": sum(dictionary.size for dictionary in coded.dictionaries),
        },
        "label": {"column": log.label, "positive": str(log.rule)},
        "min_count": min_count,
        "split": {"kind": split, "seed": seed if split == "random" else None, "time": log.time},
        "splits": {
            name: {"rows": int(chosen.sum()), "positives": float(coded.labels[chosen].mean())}
            for name, chosen in ((name, splits == index) for index, name in enumerate(SPLITS))
        },
        "fields": fields,
        "dense": [log.numbers[index] for index in dense],
        "dropped": dropped,
    }


def _check_rows(coded: CodedLog, splits: npt.NDArray[np.uint8]) -> None:
    """Raise a UserError if a part of the split is empty or all labels are alike."""
    path, rows = coded.log.path, coded.rows
    for name, count in zip(SPLITS, np.bincount(splits, minlength=len(SPLITS)).tolist(), strict=True):
        if count == 0:
            cause = f"{rows} rows are too few" if coded.times is None else f"{rows} rows have too few different times"
            raise UserError(f"{path}: the {name} part of the 8:1:1 split gets no row, as {cause}: give more rows")
    positives = int(coded.labels.sum())
    if positives in (0, rows):
        kind = "positive" if positives else "negative"
        raise UserError(
            f"{path}: column {coded.log.label!r} makes every row {kind} (positive is {coded.log.rule}): "
            "say with another rule which labels are positive"
        )
