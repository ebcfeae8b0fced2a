"""`torchrec-mpe inspect`: what is in an artifact, a precision plan, or prepared data."""

import argparse
import json
from pathlib import Path

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.data.split import SPLITS
from torchrec_mpe.errors import UserError
from torchrec_mpe.inference.artifact.manifest import Document
from torchrec_mpe.inference.artifact.opening import open_artifact
from torchrec_mpe.packing.size import size_report
from torchrec_mpe.precision.plan import PrecisionPlan


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser("inspect", help="show tables, bit-widths and bytes of an artifact or a plan")
    parser.add_argument("path", type=Path, help="an artifact's folder, a plan.json, or a folder of prepared data")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what ``options.path`` holds."""
    path: Path = options.path
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        print(_describe(path))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    return 0


def _describe(path: Path) -> str:
    if path.is_file():
        plan = PrecisionPlan.load(path)
        return f"precision plan {path}\nprovenance: {json.dumps(plan.provenance)}\n\n{plan.summary()}"
    manifest = path / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{path} is neither an artifact, nor a plan, nor prepared data: it holds no manifest.json")
    if (path / "vocabulary").is_dir():
        data = PreparedDataset.open(path)
        rows = ", ".join(f"{data.num_rows(s):,} {s}" for s in SPLITS)
        return "\n".join(
            [f"prepared data {path}", f"rows: {rows}", *(f"{f.name}: {f.num_embeddings:,} ids" for f in data.fields)]
        )
    artifact = open_artifact(path, directories=False, digests=False)
    parts = [f"artifact {path}", *_provenance(artifact.manifest)]
    for collection in artifact.manifest["collections"]:
        opened = artifact.collections[collection["name"]]
        packed = opened.packed_tables()
        widths_of = {table["name"]: table["rows_per_width"] for table in collection["tables"]}
        sizes = size_report(packed, [widths_of[table.name] for table in packed.tables])
        parts += ["", collection["name"] or "embedding bag collection", str(sizes)]
        for table in sizes.tables:
            parts.append(f"  {table.name}: {table.directory_kind}, {table.describe_rows()}")
        if opened.encoders:
            encoders = sum(encoder.nbytes for encoder in opened.encoders.values())
            parts.append(f"encoders of {len(opened.encoders)} tables, which no lookup reads: {encoders:,} bytes")
    if artifact.dense:
        dense = sum(tensor.nbytes for tensor in artifact.dense.values())
        parts += ["", f"dense: {len(artifact.dense)} tensors, {dense:,} bytes"]
    return "\n".join(parts)


def _provenance(manifest: Document) -> list[str]:
    provenance = manifest["provenance"]
    lines = ["written by: " + ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())]
    if provenance["precision_plan"] is not None:
        lines.append(f"precision plan: {json.dumps(provenance['precision_plan'])}")
    if manifest["metadata"]:
        lines.append(f"metadata: {json.dumps(manifest['metadata'])}")
    return lines
