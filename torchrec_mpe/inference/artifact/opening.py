"""What an artifact's folder holds, opened only if all of it fits together."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from torchrec_mpe.inference.artifact.manifest import Document, read_manifest
from torchrec_mpe.inference.artifact.tensor_files import map_tensors, sha256_of_header, sha256_of_tensor
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.ops.check_bags import OUTPUT_DTYPES
from torchrec_mpe.packing.packed_tables import PackedTables, TableShape
from torchrec_mpe.packing.size import size_report
from torchrec_mpe.packing.update_coded import check_encoder
from torchrec_mpe.packing.validate import validate_packed_tables

BULK = ("weights", "directory")
"""The tensors whose size grows with the rows of the tables; all others take a few bytes a table and run."""

ENCODER = "encoder."
"""What the name of an encoder begins with; the table's follows."""

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

    Always checked, before any memory is taken: the manifest against its schema, its digest and itself; the files'
    headers by their digests, and by them the files' sizes; the digests of the dense tensors, and of all tensors of
    packed tables but weights and directories; and that by them every table, run, scale and 0-bit row lies inside its
    buffer, and that every byte is some table's.

    Args:
        path (PathLike): the folder.
        in_memory (bool): copy the tensors from the files; otherwise they are on the files' pages.
        directories (bool): also read remaps and lines, and check that they lead to the rows of their tables.
        digests (bool): also read everything, and check every digest.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: one sentence naming file, table or tensor, if something is damaged or does not fit the rest.
    """
    folder = Path(path)
    document = read_manifest(folder)
    files = {name: _open_file(folder / name, entry) for name, entry in document["files"].items()}

    def tensors_of(names: Iterable[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in names:
            if twice := found.keys() & files[file].keys():
                raise ValueError(f"{folder / file}: tensor {min(twice)!r} is in another file too")
            found |= files[file]
        return found

    def check_digests(names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
        for file in names:
            for name, digest in document["files"][file]["tensors"].items():
                if name in tensors and sha256_of_tensor(tensors[name]) != digest:
                    raise ValueError(f"{folder / file} is damaged: tensor {name!r} has another digest")

    collections: dict[str, PackedEmbeddingBagCollection] = {}
    for entry in document["collections"]:
        try:
            tensors = tensors_of(entry["files"])
            check_digests(entry["files"], {name: tensor for name, tensor in tensors.items() if name not in BULK})
            encoders = _take_encoders(tensors)
            # Without a look at remaps and lines, for these may be a thousand times larger than the rest.
            packed, rows_per_width = _packed_tables(entry, tensors)
            if in_memory:
                packed = PackedTables(packed.tables, **{name: tensor.clone() for name, tensor in tensors.items()})
                encoders = {name: tensor.clone() for name, tensor in encoders.items()}
            if digests:
                check_digests(entry["files"], {name: packed.tensors()[name] for name in BULK})
            if directories:
                validate_packed_tables(packed)
                for table, declared in zip(size_report(packed).tables, rows_per_width, strict=True):
                    if list(table.rows_per_width) != declared:
                        raise ValueError(f"table {table.name} has other bit-widths than the manifest says")
            collections[entry["name"]] = _collection(entry, packed, encoders)
        except (TypeError, ValueError) as error:
            what = f"collection {entry['name']!r}" if entry["name"] else "its collection"
            raise ValueError(f"{folder}: {what} is not what the manifest says: {error}") from error
    others = [name for name in files if not any(name in entry["files"] for entry in document["collections"])]
    dense = tensors_of(others)
    if in_memory:
        dense = {name: tensor.clone() for name, tensor in dense.items()}
    check_digests(others, dense)
    return Artifact(document, collections, dense)


def _open_file(file: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is incomplete: {file.name} is missing")
    if sha256_of_header(file) != entry["header_sha256"]:
        raise ValueError(f"{file} is damaged: its header has another digest")
    tensors = map_tensors(file)
    if differing := sorted(tensors.keys() ^ entry["tensors"].keys()):
        names = ", ".join(repr(name) for name in differing[:5])
        raise ValueError(f"{file} and the manifest disagree on whether it holds {names:.500}")
    return tensors


def _packed_tables(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[PackedTables, list[list[int]]]:
    """The tables of a collection, checked as far as that takes no look at every line of their directories.

    Returns:
        PackedTables: on the tensors.
        List[List[int]]: rows of each bit-width of each table.
    """
    names = {field.name for field in fields(PackedTables)} - {"tables"}
    if differing := sorted(names ^ tensors.keys()):
        raise ValueError(f"tensors {', '.join(map(repr, differing[:5])):.500} are missing, or no table's")
    by_name = {table["name"]: table for table in entry["tables"]}
    ordered = [by_name[name] for name in entry["packed_order"]]
    shapes = tuple(TableShape(t["name"], t["num_embeddings"], t["embedding_dim"]) for t in ordered)
    packed, rows_per_width = PackedTables(tables=shapes, **tensors), [table["rows_per_width"] for table in ordered]
    validate_packed_tables(packed, rows_per_width)
    size_report(packed, rows_per_width)
    return packed, rows_per_width


def _take_encoders(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a collection's tensors that are encoders, by table, and no longer among them."""
    names = [name for name in tensors if name.startswith(ENCODER)]
    return {name.removeprefix(ENCODER): tensors.pop(name) for name in names}


def _collection(
    entry: Mapping[str, Any], packed: PackedTables, encoders: Mapping[str, Tensor]
) -> PackedEmbeddingBagCollection:
    for t, table in enumerate(packed.tables):
        if table.name in encoders:
            check_encoder(packed, t, encoders[table.name])
    if others := sorted(encoders.keys() - {table.name for table in packed.tables}):
        raise ValueError(f"there is an encoder of table {others[0]!r:.200}, which is not there")
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
    return PackedEmbeddingBagCollection(configs, packed, entry["is_weighted"], dtype, encoders=encoders)
