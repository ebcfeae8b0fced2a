"""What an artifact's folder holds, opened only if all of it fits together."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from torchrec_mpe.inference.artifact.manifest import Document, read_manifest
from torchrec_mpe.inference.artifact.tensor_files import DTYPES, map_tensors, sha256_of_tensor
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.ops.check_bags import OUTPUT_DTYPES
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.packing.packed_tables import PackedTables, TableShape
from torchrec_mpe.packing.size import SizeReport, TableSize, size_report
from torchrec_mpe.packing.validate import validate_packed_tables

BULK = ("weights", "directory")
"""The tensors whose size grows with the rows of the tables; all others take a few bytes a table and run."""

OUTPUT_DTYPES_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in OUTPUT_DTYPES}


@dataclass(frozen=True)
class Artifact:
    """An opened artifact.

    Attributes:
        manifest (Document): the manifest.
        collections (Mapping[str, PackedEmbeddingBagCollection]): by the module's path in the model, on the CPU.
        dense (Mapping[str, Tensor]): the rest of the model's state dict, on the CPU.
    """

    manifest: Document
    collections: Mapping[str, PackedEmbeddingBagCollection]
    dense: Mapping[str, Tensor]


def open_artifact(
    path: str | os.PathLike[str], *, in_memory: bool = False, directories: bool = True, digests: bool = True
) -> Artifact:
    """Open the folder of an artifact.

    Always checked, before any memory is taken: the manifest against its schema, its digest and itself; the files' sizes
    and headers against the manifest; the digests of all tensors of packed tables but weights and directories, and that
    by them every table, run, scale and 0-bit row lies inside its buffer.

    Args:
        path (PathLike): the folder.
        in_memory (bool): copy the tensors from the files; otherwise they are on the files' pages.
        directories (bool): also read remaps and lines, and check that they lead to the rows of their tables, and the
            sizes of tables by kind.
        digests (bool): also read everything, and check every digest.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: one sentence naming file, table or tensor, if something is damaged or does not fit the rest.
    """
    folder = Path(path)
    document = read_manifest(folder)
    files = {name: _open_file(folder, document, name) for name in document["files"]}
    wanted: dict[str, dict[str, Any]] = {name: {} for name in files}
    for group in (document["dense"], *(collection["tensors"] for collection in document["collections"])):
        for name, entry in group.items():
            if wanted[entry["file"]].setdefault(name, entry) is not entry:
                raise ValueError(f"{folder / entry['file']} would hold two tensors named {name!r}")
    for name, tensors in files.items():
        _check_header(folder / name, tensors, wanted[name])

    def mapped(entries: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: files[entry["file"]][name] for name, entry in entries.items()}

    def check_digests(tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> None:
        for name, tensor in tensors.items():
            if sha256_of_tensor(tensor) != entries[name]["sha256"]:
                raise ValueError(f"{folder / entries[name]['file']} is damaged: tensor {name!r} has another digest")

    collections: dict[str, PackedEmbeddingBagCollection] = {}
    for entry in document["collections"]:
        try:
            tensors = mapped(entry["tensors"])
            check_digests({name: tensor for name, tensor in tensors.items() if name not in BULK}, entry["tensors"])
            # Without a look at remaps and lines, for these may be a thousand times larger than the rest.
            packed = _packed_tables(entry, tensors)
            if in_memory:
                packed = PackedTables(packed.tables, **{name: tensor.clone() for name, tensor in tensors.items()})
            if digests:
                check_digests({name: packed.tensors()[name] for name in BULK}, entry["tensors"])
            if directories:
                validate_packed_tables(packed)
                _check_sizes(entry, size_report(packed))
            collections[entry["name"]] = _collection(entry, packed)
        except (TypeError, ValueError) as error:
            what = f"collection {entry['name']!r}" if entry["name"] else "its collection"
            raise ValueError(f"{folder}: {what} is not what the manifest says: {error}") from error
    dense = mapped(document["dense"])
    if in_memory:
        dense = {name: tensor.clone() for name, tensor in dense.items()}
    if digests:
        check_digests(dense, document["dense"])
    return Artifact(document, collections, dense)


def declared_sizes(collection: Mapping[str, Any]) -> SizeReport:
    """The size of a collection of a manifest, in the order of the tensors."""
    by_name = {table["name"]: table for table in collection["tables"]}
    kinds = ("payload", "directory", "scales", "zero_rows", "padding", "fp32_bytes")
    tables = tuple(
        TableSize(
            **{kind: table["bytes"][kind] for kind in kinds},
            name=table["name"],
            num_embeddings=table["num_embeddings"],
            embedding_dim=table["embedding_dim"],
            directory_kind=table["directory"],
            rows_per_width=tuple(table["rows_per_width"]),
        )
        for table in (by_name[name] for name in collection["packed_order"])
    )
    return SizeReport(**{kind: collection["bytes"][kind] for kind in kinds}, tables=tables)


def _open_file(folder: Path, document: Document, name: str) -> dict[str, Tensor]:
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is incomplete: {name} is missing")
    size = file.stat().st_size
    if size != document["files"][name]:
        raise ValueError(f"{file} is damaged: it has {size} bytes, the manifest says {document['files'][name]}")
    return map_tensors(file)


def _check_header(file: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> None:
    if differing := sorted(tensors.keys() ^ entries.keys()):
        names = ", ".join(repr(name) for name in differing[:5])
        raise ValueError(f"{file} and the manifest disagree on whether it holds {names:.500}")
    for name, tensor in tensors.items():
        found, wanted = (tensor.dtype, list(tensor.shape)), (DTYPES[entries[name]["dtype"]], entries[name]["shape"])
        if found != wanted:
            raise ValueError(
                f"{file}: tensor {name!r} is {found[0]} {found[1]}, the manifest says {wanted[0]} {wanted[1]}"
            )


def _packed_tables(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedTables:
    """The tables of a collection, checked as far as that takes no look at every line of their directories."""
    by_name = {table["name"]: table for table in entry["tables"]}
    ordered = [by_name[name] for name in entry["packed_order"]]
    shapes = tuple(TableShape(t["name"], t["num_embeddings"], t["embedding_dim"]) for t in ordered)
    packed = PackedTables(tables=shapes, **tensors)
    validate_packed_tables(packed, [table["rows_per_width"] for table in ordered])
    for table, kind in zip(ordered, packed.directory_kinds.tolist(), strict=True):
        if table["directory"] != Directory(kind).name.lower():
            raise ValueError(
                f"table {table['name']} has a {Directory(kind).name.lower()} directory, not the manifest's"
            )
    return packed


def _check_sizes(entry: Mapping[str, Any], found: SizeReport) -> None:
    declared = declared_sizes(entry)
    for table, said in zip(found.tables, declared.tables, strict=True):
        if table.rows_per_width != said.rows_per_width:
            raise ValueError(f"table {table.name} has other bit-widths than the manifest says")
    if found != declared:
        raise ValueError("its tables do not have the bytes by kind that the manifest says")


def _collection(entry: Mapping[str, Any], packed: PackedTables) -> PackedEmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(
            name=table["name"],
            num_embeddings=table["num_embeddings"],
            embedding_dim=table["embedding_dim"],
            feature_names=list(table["feature_names"]),
            pooling=PoolingType(table["pooling"]),
        )
        for table in entry["tables"]
    ]
    dtype: torch.dtype = OUTPUT_DTYPES_BY_NAME[entry["output_dtype"]]
    return PackedEmbeddingBagCollection(configs, packed, entry["is_weighted"], dtype)
