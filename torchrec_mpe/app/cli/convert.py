"""`torchrec-mpe convert`: pack the tables of a trained checkpoint, without a search."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torchrec_mpe.app.cli.checkpoint_command import (
    add_checkpoint_options,
    check_target,
    finish,
    mistakes,
    sizes_of,
    tables_of,
)
from torchrec_mpe.app.training.quiet import quiet_dependencies
from torchrec_mpe.files.text_table import text_table
from torchrec_mpe.inference.convert.checkpoint_tables import CheckpointTable
from torchrec_mpe.inference.convert.convert import Conversion, convert_checkpoint
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


def run(options: argparse.Namespace) -> int:
    """Convert, write the artifact, and print what became of each table."""
    budget = check_target(options, "ratio", "max_error")
    quiet_dependencies()
    with mistakes():
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
    document = _document(conversion)
    errors = {table["name"]: {key: table[key] for key in _ERRORS} for table in document["tables"]}
    notes = [
        f"table {name}: row {found.outlier} is {found.outlier_size:.0f} times as large as the median row, and "
        "most rows have 0 bits for its sake: remove or clip it"
        for name, found in conversion.errors.items()
        if found.outlier is not None
    ]
    return finish(
        options,
        conversion.model,
        document,
        _printed(document),
        notes,
        metadata={"errors": errors},
        plan=conversion.plan,
    )


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
    sizes, total = sizes_of(conversion.model)
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
            "outlier_row": errors.outlier,
        }
        for name, errors in conversion.errors.items()
    ]
    return {"tables": tables, **total, "method": conversion.plan.provenance["method"]}


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
