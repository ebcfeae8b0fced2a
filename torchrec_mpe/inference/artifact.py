"""An inference model as a folder: a manifest that people can read, and safetensors files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from torchrec_mpe.atomic import atomic_directory
from torchrec_mpe.digest import file_sha256
from torchrec_mpe.modules.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.ops.check_bags import OUTPUT_DTYPES
from torchrec_mpe.packing import PackedTables, TableShape, validate_packed_tables
from torchrec_mpe.versions import __version__, installed_versions

_FORMAT = "torchrec_mpe.artifact"
_VERSION = 2
_MANIFEST = "manifest.json"
_DENSE = "dense.safetensors"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in OUTPUT_DTYPES}


def save(model: nn.Module, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write an emitted model; the folder appears complete or not at all.

    ::

        artifact/
            manifest.json         tables, logical shapes, bytes by kind, versions, digests
            tables-0.safetensors  the buffers of the first packed collection, and so on
            dense.safetensors     the rest of the state dict

    Args:
        model (nn.Module): holds, or is, PackedEmbeddingBagCollections, as :func:`emit_inference_model` returns.
        path (PathLike): a folder that does not exist yet, or is empty.
        metadata (Optional[Mapping]): JSON values of your own, kept in the manifest.

    Raises:
        ValueError: if the model has no packed collection.
        FileExistsError: if the folder exists and is not empty.
    """
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedEmbeddingBagCollection)}
    if not packed:
        raise ValueError(
            f"{type(model).__name__} holds no PackedEmbeddingBagCollection: emit_inference_model makes them"
        )
    prefixes = tuple(f"{name}." if name else "" for name in packed)
    dense = {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes)}
    with atomic_directory(path) as folder:
        document: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "torchrec_mpe": __version__,
            "versions": installed_versions(),
            "collections": [
                _write_collection(folder, k, name, module) for k, (name, module) in enumerate(packed.items())
            ],
            "dense": None,
            "metadata": dict(metadata or {}),
        }
        if dense:
            document["dense"] = _write_tensors(folder / _DENSE, dense)
        (folder / _MANIFEST).write_text(json.dumps(document, indent=2) + "\n")


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    *,
    backend: str = "packed",
) -> nn.Module:
    """Read what :func:`save` wrote, after checking every digest, shape, offset and width.

    Args:
        path (PathLike): the folder.
        model (Optional[nn.Module]): of the saved architecture, with any EmbeddingBagCollections, also on the meta
            device, where the saved model has packed ones; these are replaced in place and the rest is loaded. None: the
            packed collections alone.
        device (torch.device): where the tensors go.
        backend (str): how the collections store their rows, "packed" or "fbgemm", see PackedEmbeddingBagCollection.

    Returns:
        nn.Module: ``model`` in eval mode; or the PackedEmbeddingBagCollection, or a ModuleDict of several by name with
            dots as underscores.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if a file is damaged, of another version, or does not fit the others or ``model``.
    """
    folder = Path(path)
    if backend not in ("packed", "fbgemm"):
        raise ValueError(f"there is no backend {backend}: choose packed or fbgemm")
    try:
        document = _read_manifest(folder)
        collections = {entry["name"]: _read_collection(folder, entry) for entry in document["collections"]}
        dense = _read_tensors(folder, document["dense"]) if document["dense"] else {}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder / _MANIFEST} is damaged: {type(error).__name__} {error}") from error
    if backend == "fbgemm":
        collections = {name: collection.on_fbgemm() for name, collection in collections.items()}
    if model is None:
        if len(collections) == 1:
            alone: nn.Module = next(iter(collections.values())).to(device)
            return alone
        return nn.ModuleDict({name.replace(".", "_"): c for name, c in collections.items()}).to(device)
    return _into(model, collections, dense, folder).to(device).eval()


def _into(
    model: nn.Module, collections: Mapping[str, PackedEmbeddingBagCollection], dense: Mapping[str, Tensor], folder: Path
) -> nn.Module:
    if "" in collections:
        return collections[""]
    # All checks come before the first replacement: a model that does not fit stays as it was.
    for name, collection in collections.items():
        try:
            replaced = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"{folder} has an embedding collection at {name}, the model has not: {error}") from error
        if not isinstance(replaced, EmbeddingBagCollectionInterface):
            raise ValueError(f"{folder} has an embedding collection at {name}, the model a {type(replaced).__name__}")
        if _described(replaced) != _described(collection):
            raise ValueError(
                f"{folder} has tables {_described(collection)} at {name}, the model has {_described(replaced)}"
            )
    prefixes = tuple(f"{name}." for name in collections)
    wanted = {key: value.shape for key, value in model.state_dict().items() if not key.startswith(prefixes)}
    if {key: value.shape for key, value in dense.items()} != wanted:
        differing = sorted(set(wanted) ^ set(dense)) or sorted(k for k in wanted if wanted[k] != dense[k].shape)
        raise ValueError(f"{folder / _DENSE} does not fit the model: {', '.join(differing[:5])}")
    for name, collection in collections.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, collection)
    model.load_state_dict(dict(dense), strict=False, assign=True)
    return model


def _described(collection: EmbeddingBagCollectionInterface) -> tuple[bool, list[tuple[str, int, int, list[str], str]]]:
    """Whether it is weighted, and name, rows, dimension, features and pooling of each table."""
    return collection.is_weighted(), [
        (t.name, t.num_embeddings, t.embedding_dim, list(t.feature_names), t.pooling.value)
        for t in collection.embedding_bag_configs()
    ]


def _write_collection(folder: Path, number: int, name: str, module: PackedEmbeddingBagCollection) -> dict[str, Any]:
    packed, report = module.packed_tables(), module.size_report()
    # The tensors' order, which need not be the configs': offsets in the tensors are by table index.
    index = {table.name: t for t, table in enumerate(packed.tables)}
    return {
        "name": name,
        "packed_order": [table.name for table in packed.tables],
        "is_weighted": module.is_weighted(),
        "output_dtype": str(module.output_dtype()).removeprefix("torch."),
        "tables": [
            {
                "name": t.name,
                "num_embeddings": t.num_embeddings,
                "embedding_dim": t.embedding_dim,
                "feature_names": list(t.feature_names),
                "pooling": t.pooling.value,
                "directory": size.directory_kind,
                "rows_per_width": list(size.rows_per_width),
                "bytes": size.to_dict(),
            }
            for t in module.embedding_bag_configs()
            for size in (report.tables[index[t.name]],)
        ],
        "bytes": report.to_dict(),
        "tensors": _write_tensors(folder / f"tables-{number}.safetensors", packed.tensors()),
    }


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    # Copies: safetensors refuses tensors that share memory.
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, file)
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / _MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no artifact: it holds no {_MANIFEST}")
    try:
        document = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError(f"{file} does not describe an artifact")
    if document.get("version") == 1:
        raise ValueError(f"{file} was written by an earlier pre-release of torchrec_mpe: emit the model again")
    if document.get("version") != _VERSION:
        raise ValueError(f"{file} is of version {document.get('version')}, this release reads version {_VERSION}")
    return document


def _read_tensors(folder: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    name = entry["file"]
    if name != Path(name).name:
        raise ValueError(f"{folder / _MANIFEST} names a file outside its folder: {name!r}")
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is incomplete: {name} is missing")
    if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
        raise ValueError(f"{file} is damaged: its size or digest is not the manifest's")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _read_collection(folder: Path, entry: Mapping[str, Any]) -> PackedEmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(
            name=t["name"],
            num_embeddings=t["num_embeddings"],
            embedding_dim=t["embedding_dim"],
            feature_names=list(t["feature_names"]),
            pooling=PoolingType(t["pooling"]),
        )
        for t in entry["tables"]
    ]
    tensors = _read_tensors(folder, entry["tensors"])
    file = folder / entry["tensors"]["file"]
    try:
        by_name = {c.name: TableShape(c.name, c.num_embeddings, c.embedding_dim) for c in configs}
        shapes = tuple(by_name[name] for name in entry["packed_order"])
        packed = PackedTables(tables=shapes, **tensors)
        validate_packed_tables(packed)
        collection = PackedEmbeddingBagCollection(
            packed=packed,
            tables=configs,
            is_weighted=entry["is_weighted"],
            output_dtype=_DTYPES[entry["output_dtype"]],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} does not hold what the manifest says: {error}") from error
    sizes = {size.name: size for size in collection.size_report().tables}
    for t in entry["tables"]:
        size = sizes[t["name"]]
        if (t["directory"], t["rows_per_width"]) != (size.directory_kind, list(size.rows_per_width)):
            raise ValueError(
                f"{file}: table {t['name']} has another directory or other bit-widths than the manifest says"
            )
    return collection
