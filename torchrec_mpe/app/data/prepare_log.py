"""Prepare a log for training: count its values, give them ids, split its rows, write it all as arrays."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet

from torchrec_mpe.app.data.coded_log import CodedLog, code_log
from torchrec_mpe.app.data.dataset import FORMAT_VERSION, PreparedDataset
from torchrec_mpe.app.data.log import Log
from torchrec_mpe.app.data.log_files import log_files
from torchrec_mpe.app.data.reader import checked_log
from torchrec_mpe.app.data.split import SPLITS, SplitKind, assign_splits, check_split
from torchrec_mpe.app.data.split_writer import count_training_values, write_splits
from torchrec_mpe.app.data.vocabulary import build_vocabulary
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.atomic import atomic_directory
from torchrec_mpe.files.progress import progress_bar
from torchrec_mpe.upstream.versions import __version__


def prepare_log(
    log: Log,
    out: str | os.PathLike[str],
    *,
    min_count: int = 2,
    split: SplitKind = "random",
    seed: int = 0,
    progress: bool = True,
) -> PreparedDataset:
    """Prepare a log for training.

    Numbers become categories (``floor(ln(v)^2)`` for v > 2, otherwise v) and dense features (``log1p(max(v, 0))``, 0
    where missing). A column that holds one single value is left out; ``notes`` of the result says which. Rows keep the
    file's order inside each part of the split.

    Args:
        log (Log): the log, see :func:`criteo_log` and :func:`csv_log`.
        out (PathLike): a folder that does not exist yet or is empty; it appears complete or not at all.
        min_count (int): values seen fewer times in training rows share one id a field. At least 1.
        split (str): "random" or "chronological" (by the log's times, else in file order), 8:1:1.
        seed (int): of the random split. At least 0.
        progress (bool): whether to show progress bars.

    Raises:
        UserError: if the log cannot be read, a column is missing, a cell is not what it should be (with its line
            number), or an option is wrong.
        OSError: if the disk is full or cannot be written; nothing is left behind.
    """
    out = Path(out)
    check_split(split, seed, log.time)
    if min_count < 1:
        raise UserError(f"min_count is {min_count}: give 1 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not an empty folder: choose another or remove it")
    log = checked_log(log)
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
    columns = progress_bar(log.columns, unit="field", desc="ordering", disable=not progress)
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
            f"{log.name} holds no ids: columns {names} are empty in every row: name columns that have values"
        )
    if not fields:
        raise UserError(f"{log.name} has no field to learn from: {dropped[0]['name']} {dropped[0]['reason']}")

    dense = np.flatnonzero(coded.dense_bounds[:, 0] < coded.dense_bounds[:, 1]).tolist()
    for index, name in enumerate(log.numbers):
        if index not in dense:
            dropped.append({"name": name, "as": "dense feature", "reason": "holds one single value in the whole file"})
    write_splits(coded, folder, splits, ids, dense, progress=progress)
    return {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "source": {
            "path": log.name,
            "format": log.format,
            "bytes": sum(file.stat().st_size for file in log_files(log.paths)),
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
    path, rows = coded.log.name, coded.rows
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
