"""What commands write: where to is found out before any work is done."""

import argparse
import json
import os
import tempfile
from pathlib import Path

from torchrec_mpe.errors import UserError
from torchrec_mpe.files.atomic import atomic_file


def check_output(options: argparse.Namespace, *, reusable: str | None = None) -> None:
    """See that --out is free and that --json can be a file, where a command has them.

    What is called ``reusable`` in --out may stand there already.

    Raises:
        UserError: if not.
    """
    out: Path | None = getattr(options, "out", None)
    file: Path | None = getattr(options, "json", None)
    if out is not None:
        if out.exists() and (not out.is_dir() or any(entry.name != reusable for entry in out.iterdir())):
            raise UserError(f"--out {out} already exists and is not an empty folder: choose another")
        _check_writable("--out", out)
    if file is not None:
        if file.exists() and not file.is_file():
            what = "a folder" if file.is_dir() else "no regular file"
            raise UserError(f"--json {file} is {what}: give the path of a file")
        if out is not None and file.resolve() == out.resolve():
            raise UserError(f"--json {file} is the folder of --out: give the path of a file")
        _check_writable("--json", file)


def write_json(path: Path | None, document: object) -> None:
    """Write what --json wants, if it is given."""
    if path is not None:
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n")


def _check_writable(option: str, path: Path) -> None:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"{option} {path}: {folder} is no folder: choose another place")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=folder))  # what access() says is not true of root
    except OSError as error:
        raise UserError(
            f"{option} {path}: {folder} cannot be written to ({error.strerror}): choose another place"
        ) from error
