"""Where commands write: found out before any work is done."""

import argparse

from torchrec_mpe.errors import UserError


def check_output(options: argparse.Namespace) -> None:
    """See that --out, where a command has it, is free and that --json can be a file.

    Raises:
        UserError: if not.
    """
    if options.json is not None and options.json.is_dir():
        raise UserError(f"--json {options.json} is a folder: give the path of a file")
    out = getattr(options, "out", None)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} already exists and is not an empty folder: choose another")
