"""What the commands that pack a trained checkpoint share: its options, mistakes in it, and what becomes of it."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from torchrec_mpe.app.cli.output import check_output, write_json
from torchrec_mpe.distributed.planner.cluster import parse_bytes
from torchrec_mpe.errors import UserError
from torchrec_mpe.inference.artifact.save_load import save
from torchrec_mpe.inference.convert.checkpoint_files import open_checkpoint
from torchrec_mpe.inference.convert.checkpoint_tables import (
    TORCHREC_PATTERN,
    CheckpointTable,
    find_tables,
    read_checkpoint_tables,
)
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.packing.size import TableSize
from torchrec_mpe.precision.plan import PrecisionPlan


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the checkpoint, its tables and the output."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a .safetensors file or a folder of them, a torch.save'd state dict, or a folder of "
        "torch.distributed.checkpoint",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the artifact; must not exist")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--tables",
        type=Path,
        metavar="FILE",
        help="YAML with a list `tables` of name, num_embeddings, embedding_dim, and, if not the defaults, "
        "feature_names (the name), pooling (sum), weighted (false), key (the key that ends in NAME.weight)",
    )
    which.add_argument(
        "--pattern",
        metavar="REGEX",
        help="tables are the matrices whose whole key matches; its one group is the table's name "
        "(default: those of EmbeddingBagCollections)",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read torch.distributed.checkpoint's .metadata, a pickle that can run any code",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def check_target(options: argparse.Namespace, *targets: str) -> int | None:
    """Check the options of the checkpoint and of what to reach; returns the budget in bytes, if there is one.

    Raises:
        UserError: naming the option.
    """
    for name in targets:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be a positive number, got {value}")
    check_output(options)
    if (options.checkpoint / ".metadata").is_file() and not options.allow_pickle:
        raise UserError(
            f"{options.checkpoint} is a checkpoint of torch.distributed.checkpoint, whose .metadata is a pickle that "
            "can run any code: give --allow-pickle if you trust who wrote it"
        )
    try:
        return None if options.bytes is None else parse_bytes(options.bytes)
    except ValueError as error:
        raise UserError(f"--bytes: {error}") from error


def tables_of(options: argparse.Namespace) -> list[CheckpointTable]:
    """The checkpoint's tables, as the options list or find them.

    Raises:
        UserError: if none is found.
    """
    if options.tables is not None:
        return read_checkpoint_tables(options.tables)
    files = open_checkpoint(options.checkpoint, allow_pickle=options.allow_pickle)
    try:
        return find_tables(files, options.pattern or TORCHREC_PATTERN)
    except ValueError as error:
        raise UserError(f"{error}; list the tables with --tables, or give another --pattern") from error


@contextmanager
def mistakes() -> Iterator[None]:
    """What the library refuses of a checkpoint and the files beside it, as a user's mistake."""
    try:
        yield
    except (KeyError, ValueError, FileNotFoundError) as error:
        # A KeyError's str() is its message in quotes.
        raise UserError(str(error.args[0] if isinstance(error, KeyError) else error)) from error


def sizes_of(model: nn.Module) -> tuple[dict[str, TableSize], dict[str, Any]]:
    """The sizes of a packed model's tables by name, and of all together as --json writes them."""
    reports = [m.size_report() for m in model.modules() if isinstance(m, PackedEmbeddingBagCollection)]
    total, fp32 = sum(report.total for report in reports), sum(report.fp32_bytes for report in reports)
    return (
        {size.name: size for report in reports for size in report.tables},
        {"bytes": total, "fp32_bytes": fp32, "compression_ratio": round(fp32 / total, 4)},
    )


def finish(
    options: argparse.Namespace,
    model: nn.Module,
    document: Mapping[str, Any],
    printed: str,
    notes: Sequence[str] = (),
    *,
    metadata: Mapping[str, Any] | None = None,
    plan: PrecisionPlan | None = None,
) -> int:
    """Write the artifact, print what became of each table and what is to be noted, and write --json.

    Returns:
        int: 0, the exit code.
    """
    save(model, options.out, metadata=metadata, plan=plan)
    print(printed)
    for note in notes:
        print(note)
    print(f"\nartifact: {options.out}")
    write_json(options.json, document)
    return 0
