"""`torchrec-mpe convert`: pack the tables of a trained checkpoint, without a search."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torchrec_mpe.app.cli.output import check_output
from torchrec_mpe.app.training.quiet import quiet_dependencies
from torchrec_mpe.distributed.planner.cluster import parse_bytes
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.files.text_table import text_table
from torchrec_mpe.inference.artifact.save_load import save
from torchrec_mpe.inference.convert.checkpoint_files import open_checkpoint
from torchrec_mpe.inference.convert.checkpoint_tables import (
    TORCHREC_PATTERN,
    CheckpointTable,
    find_tables,
    read_checkpoint_tables,
)
from torchrec_mpe.inference.convert.convert import Conversion, convert_checkpoint
from torchrec_mpe.packing.size import TableSize
from torchrec_mpe.precision.frequency_counter import FrequencyCounter

_ERRORS = ("weighted_relative_rms_error", "relative_rms_error", "max_abs_error")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser("convert", help="pack the tables of a trained checkpoint, without a search")
    add_checkpoint_options(parser)
    parser.add_argument(
        "--frequencies",
        type=Path,
        metavar="FILE",
        help="counted lookups, of FrequencyCounter.save (default: all equal)",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--ratio", type=float, help="compression against FP32 rows, such as 8")
    target.add_argument("--bytes", metavar="SIZE", help="of all packed tables, such as 100MB")
    target.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="largest relative RMS error of each table, rows weighted by their lookups, such as 0.05",
    )
    parser.add_argument(
        "--zero-row", choices=["learned", "zero"], default="learned", help="0-bit rows read their mean, or zeros"
    )
    parser.set_defaults(run=run)


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the checkpoint, its tables and the output, which `compress` shares."""
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


def run(options: argparse.Namespace) -> int:
    """Convert, write the artifact, and print what became of each table."""
    budget = check_target(options, "ratio", "max_error")
    quiet_dependencies()
    try:
        tables = tables_of(options)
        counts = None if options.frequencies is None else FrequencyCounter.load(options.frequencies)
        for note in _notes(options, tables, counts):
            print(note)
        conversion = convert_checkpoint(
            options.checkpoint,
            tables,
            counts,
            ratio=options.ratio,
            bytes=budget,
            max_error=options.max_error,
            zero_row=options.zero_row,
            allow_pickle=options.allow_pickle,
            progress=not options.quiet,
        )
    except (KeyError, ValueError, FileNotFoundError) as error:
        # A KeyError's str() is its message in quotes.
        raise UserError(str(error.args[0] if isinstance(error, KeyError) else error)) from error
    document = _document(conversion)
    errors = {table["name"]: {key: table[key] for key in _ERRORS} for table in document["tables"]}
    save(conversion.model, options.out, metadata={"errors": errors}, plan=conversion.plan)
    print(_printed(document))
    print(f"\nartifact: {options.out}")
    if options.json is not None:
        with atomic_file(options.json) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n")
    return 0


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


def _notes(
    options: argparse.Namespace, tables: list[CheckpointTable], counts: Mapping[str, Tensor] | None
) -> list[str]:
    notes = []
    if options.tables is None:
        notes.append("features are called like their tables, pooled by sum: --tables says otherwise")
    if counts is None:
        notes.append("no --frequencies: all rows count alike, so that rarely read rows get as many bits as others")
    else:
        unseen = [t.config.name for t in tables if t.config.name in counts and not bool(counts[t.config.name].any())]
        if unseen:
            notes.append(f"no lookups are counted for {', '.join(unseen)}: their rows get bits last")
    return notes


def _document(conversion: Conversion) -> dict[str, Any]:
    sizes: dict[str, TableSize] = {}
    reports = [collection.size_report() for collection in conversion.collections()]
    for report in reports:
        sizes.update({size.name: size for size in report.tables})
    tables = [
        {
            "name": name,
            "num_embeddings": sizes[name].num_embeddings,
            "embedding_dim": sizes[name].embedding_dim,
            "directory": sizes[name].directory_kind,
            "rows_per_width": list(sizes[name].rows_per_width),
            "bytes": sizes[name].total,
            "compression_ratio": round(sizes[name].compression_ratio, 4),
            "weighted_relative_rms_error": errors.weighted_relative_rms,
            "relative_rms_error": errors.relative_rms,
            "max_abs_error": errors.max_abs_error,
        }
        for name, errors in conversion.errors.items()
    ]
    total, fp32 = sum(report.total for report in reports), sum(report.fp32_bytes for report in reports)
    return {
        "tables": tables,
        "bytes": total,
        "fp32_bytes": fp32,
        "compression_ratio": round(fp32 / total, 4),
        "method": conversion.plan.provenance["method"],
    }


def _printed(document: Mapping[str, Any]) -> str:
    widths = [b for b in range(9) if any(t["rows_per_width"][b] for t in document["tables"])]
    head = ["table", "rows", "dim", *(f"{b}-bit" for b in widths), "bytes", "ratio", "error", "unweighted", "max abs"]
    lines = [head]
    for t in document["tables"]:
        lines.append(
            [
                t["name"],
                f"{t['num_embeddings']:,}",
                str(t["embedding_dim"]),
                *(f"{t['rows_per_width'][b]:,}" for b in widths),
                f"{t['bytes']:,}",
                f"{t['compression_ratio']:.1f}x",
                *("-" if error is None else f"{error:.4f}" for error in map(t.get, _ERRORS[:2])),
                f"{t['max_abs_error']:.3g}",
            ]
        )
    rows = sum(t["num_embeddings"] for t in document["tables"])
    per_width = [sum(t["rows_per_width"][b] for t in document["tables"]) for b in widths]
    total = [f"{document['bytes']:,}", f"{document['compression_ratio']:.1f}x", "", "", ""]
    lines.append(["all", f"{rows:,}", "", *(f"{n:,}" for n in per_width), *total])
    explained = (
        "error: relative RMS of packed rows read back, weighted by lookups; unweighted: all rows alike; max abs: "
        "largest difference of an element"
    )
    return f"{text_table(lines)}\n{explained}"
