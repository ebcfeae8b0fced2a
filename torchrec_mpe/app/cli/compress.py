"""`torchrec-mpe compress`: transform-code the tables of a trained checkpoint."""

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
from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.training.quiet import quiet_dependencies
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.text_table import text_table
from torchrec_mpe.inference.compress.compress_checkpoint import CompressedCheckpoint, compress_checkpoint
from torchrec_mpe.inference.compress.curvature import Curvature
from torchrec_mpe.inference.convert.checkpoint_tables import CheckpointTable
from torchrec_mpe.precision.frequency_counter import FrequencyCounter


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser("compress", help="transform-code the tables of a trained checkpoint to 100x and more")
    add_checkpoint_options(parser)
    counted = parser.add_mutually_exclusive_group(required=True)
    counted.add_argument("--frequencies", type=Path, metavar="FILE", help="counted lookups, of FrequencyCounter.save")
    counted.add_argument(
        "--data", type=Path, metavar="FOLDER", help="a prepared log, whose fields are the tables' features"
    )
    parser.add_argument(
        "--curvature",
        type=Path,
        metavar="FILE",
        help="of the loss, of measure_curvature(...).save (default: the identity, which costs accuracy)",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--ratio", type=float, help="compression against FP32 rows, such as 100")
    target.add_argument("--bytes", metavar="SIZE", help="of all packed tables, such as 10MB")
    parser.add_argument(
        "--unseen",
        choices=["mean", "model"],
        default="mean",
        help="what ids without lookups read: the mean row, or the mean of the model's own such rows (default: mean)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compress, write the artifact, and print what became of each table."""
    budget = check_target(options, "ratio")
    quiet_dependencies()
    with mistakes():
        tables = tables_of(options)
        if options.tables is None:
            print("features are called like their tables, pooled by sum: --tables says otherwise")
        if options.curvature is None:
            print("no --curvature: rows are coded as if the loss saw all directions and tables alike, at less accuracy")
        compressed = compress_checkpoint(
            options.checkpoint,
            tables,
            FrequencyCounter.load(options.frequencies) if options.frequencies else _counts(options.data, tables),
            None if options.curvature is None else Curvature.load(options.curvature),
            ratio=options.ratio,
            bytes=budget,
            unseen=options.unseen,
            allow_pickle=options.allow_pickle,
            progress=not options.quiet,
        )
    document = _document(compressed)
    return finish(options, compressed.model, document, _printed(document))


def _counts(folder: Path, tables: list[CheckpointTable]) -> dict[str, Tensor]:
    """The training lookups of each table's features in a prepared log."""
    data = PreparedDataset.open(folder)
    fields = {field.name: field.num_embeddings for field in data.fields}
    counts: dict[str, Tensor] = {}
    for config in (table.config for table in tables):
        names = [name if name in fields else name.removeprefix("t_") for name in config.feature_names]
        for name in names:
            if fields.get(name) != config.num_embeddings:
                has = f"has {fields[name]} ids" if name in fields else "is none of its fields"
                raise UserError(f"table {config.name} has {config.num_embeddings} rows, {name} in {folder} {has}")
        counts[config.name] = sum((data.counts(name) for name in names[1:]), start=data.counts(names[0]))
    return counts


def _document(compressed: CompressedCheckpoint) -> dict[str, Any]:
    sizes, total = sizes_of(compressed.model)
    tables = [
        {
            "name": name,
            "num_embeddings": sizes[name].num_embeddings,
            "embedding_dim": sizes[name].embedding_dim,
            "components": summary.components,
            "energy": [round(part, 6) for part in summary.energy],
            "plain_rows": summary.plain_rows,
            "transformed_rows": summary.transformed_rows,
            "unseen_rows": summary.unseen_rows,
            "bits_of_a_row": round(8 * sizes[name].payload / sizes[name].num_embeddings, 4),
            "bytes": sizes[name].total,
            "compression_ratio": round(sizes[name].compression_ratio, 4),
        }
        for name, summary in compressed.summaries.items()
    ]
    return {"tables": tables, **total}


def _printed(document: Mapping[str, Any]) -> str:
    lines = [
        ["table", "rows", "dim", "components", "energy", "plain", "transformed", "unseen", "bits", "bytes", "ratio"]
    ]
    for t in document["tables"]:
        counted = (f"{t[name]:,}" for name in ("plain_rows", "transformed_rows", "unseen_rows"))
        explained = f"{sum(t['energy'][: t['components']]):.1%}" if t["components"] else "-"
        head = [t["name"], f"{t['num_embeddings']:,}", str(t["embedding_dim"]), str(t["components"]), explained]
        size = [f"{t['bits_of_a_row']:.2f}", f"{t['bytes']:,}", f"{t['compression_ratio']:.1f}x"]
        lines.append([*head, *counted, *size])
    rows = sum(t["num_embeddings"] for t in document["tables"])
    lines.append(["all", f"{rows:,}", *[""] * 7, f"{document['bytes']:,}", f"{document['compression_ratio']:.1f}x"])
    explained = (
        "energy: the part of the rows' deviation from their mean, as the loss weighs it, that the components hold; "
        "bits: of a row on average"
    )
    return f"{text_table(lines)}\n{explained}"
