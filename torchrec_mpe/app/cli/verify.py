"""`torchrec-mpe verify`: whether an artifact is what its writer wrote."""

import argparse
from pathlib import Path

from torchrec_mpe.errors import UserError
from torchrec_mpe.inference.artifact.opening import open_artifact


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser(
        "verify", help="check every digest, offset, bit-width and row directory of an artifact"
    )
    parser.add_argument("path", type=Path, help="an artifact's folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print one line that says the artifact is sound.

    Raises:
        UserError: one sentence, if it is not.
    """
    path: Path = options.path
    if not path.is_dir():
        raise UserError(f"{path} is no artifact: {'it is no folder' if path.exists() else 'it does not exist'}")
    try:
        artifact = open_artifact(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    tables = sum(len(collection["tables"]) for collection in artifact.manifest["collections"])
    files = [path / name for name in artifact.manifest["files"]]
    print(
        f"{path}: OK, {tables} {'table' if tables == 1 else 'tables'}, {len(artifact.dense)} dense tensors, "
        f"{len(files)} files of {sum(file.stat().st_size for file in files):,} bytes"
    )
    return 0
