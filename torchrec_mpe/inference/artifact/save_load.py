"""An inference model as a folder: a manifest that people can read, and safetensors files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from torchrec_mpe.files.atomic import atomic_directory
from torchrec_mpe.inference.artifact.manifest import write_manifest
from torchrec_mpe.inference.artifact.opening import ENCODER, Artifact, open_artifact
from torchrec_mpe.inference.artifact.provenance import check_plan, provenance
from torchrec_mpe.inference.artifact.tensor_files import write_tensors
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.precision.plan import PrecisionPlan


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    plan: PrecisionPlan | None = None,
    max_file_bytes: int = 4 << 30,
    encoders: bool = True,
) -> None:
    """Write an emitted model; the folder appears complete or not at all.

    ::

        artifact/
            manifest.json           tables, rows of each bit-width, provenance, digests: artifact.schema.json
            tables-0-0.safetensors  the tensors of the first packed collection, and so on
            dense-0.safetensors     the rest of the state dict

    Nothing is copied but a few MiB at a time. Of a sharded job's ranks, one saves.

    Args:
        model (nn.Module): holds, or is, PackedEmbeddingBagCollections, as :func:`emit_inference_model` returns.
        path (PathLike): a folder that does not exist yet, or is empty.
        metadata (Optional[Mapping]): JSON values of your own, kept in the manifest.
        plan (Optional[PrecisionPlan]): where the bit-widths come from; its digest and provenance are kept in the
            manifest.
        max_file_bytes (int): a further file is begun where a tensor would make one larger. Tensors are not split, so
            that each can be memory-mapped: the rows of a collection lie in one file, however large.
        encoders (bool): also write the encoders of coded tables, 4 D K bytes a table, where the model has them: only
            with them can rows of the loaded tables be updated. No lookup reads them.

    Raises:
        ValueError: if the model has no packed collection, or metadata is no JSON; naming the table, if it is not packed
            as the plan says; naming the tensor, if it has a dtype that is not stored.
        FileExistsError: if the folder exists and is not empty.
    """
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedEmbeddingBagCollection)}
    if not packed:
        raise ValueError(
            f"{type(model).__name__} holds no PackedEmbeddingBagCollection: emit_inference_model makes them"
        )
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be JSON values: {error}") from error
    if plan is not None:
        check_plan(plan, packed.values())
    prefixes = tuple(f"{name}." if name else "" for name in packed)
    dense = {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes)}
    with atomic_directory(path) as folder:
        files: dict[str, Any] = {}
        collections = []
        for k, (name, module) in enumerate(packed.items()):
            tensors = dict(module.packed_tables().tensors())
            if encoders:
                tensors |= {ENCODER + table: tensor for table, tensor in module.encoders.items() if tensor.numel()}
            written = write_tensors(folder, f"tables-{k}", tensors, max_file_bytes)
            collections.append({**_collection(name, module), "files": list(written)})
            files |= written
        files |= write_tensors(folder, "dense", dense, max_file_bytes)
        document = {
            "provenance": provenance(plan),
            "metadata": dict(metadata or {}),
            "files": files,
            "collections": collections,
        }
        write_manifest(folder, document)


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    *,
    backend: str = "packed",
    mmap: bool = False,
    verify: bool | None = None,
) -> nn.Module:
    """Read what :func:`save` wrote.

    Always checked, in time that does not grow with the tables' rows: the manifest against its published schema, its
    digest and itself; the files' headers by their digests, and by them the files' sizes; every dense tensor, and every
    tensor of packed tables but weights and directories, by its digest, and that by them every table, run, scale and
    0-bit row lies inside its buffer. With ``verify`` also all that takes reading everything: the digests of weights and
    directories, and that every line and remap leads to a row of its table.

    Without ``verify`` a damaged directory or row gives wrong embeddings, or a ValueError in the lookup that meets it,
    but no lookup on the CPU leaves its buffers: its kernels check where a directory leads. Triton's do not, so that
    directories are always checked on the way to another device, and for the "fbgemm" backend. A model that was loaded
    to the CPU without ``verify`` is moved to another device by loading it there, not by ``.to()``.

    Args:
        path (PathLike): the folder.
        model (Optional[nn.Module]): of the saved architecture, with any EmbeddingBagCollections, also on the meta
            device, where the saved model has packed ones; these are replaced in place and the rest is loaded. None: the
            packed collections alone.
        device (torch.device): where the tensors go.
        backend (str): how the collections store their rows, "packed" or "fbgemm", see PackedEmbeddingBagCollection.
        mmap (bool): on the CPU, leave the tensors on the files' pages: they are read when they are used, and all
            processes of a host share them. A write to such a tensor is this process's alone. The files must stay as
            they are; replace the folder instead of writing to it.
        verify (Optional[bool]): read and check everything; by default unless ``mmap``.

    Returns:
        nn.Module: ``model`` in eval mode; or the PackedEmbeddingBagCollection, or a ModuleDict of several by name with
            dots as underscores.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if a file is damaged, of another version, or does not fit the others or ``model``.
    """
    if backend not in ("packed", "fbgemm"):
        raise ValueError(f"there is no backend {backend}: choose packed or fbgemm")
    target = torch.device(device)
    verify = not mmap if verify is None else verify
    directories = verify or target.type != "cpu" or backend != "packed"
    in_memory = target.type == "cpu" and not mmap
    opened = open_artifact(path, in_memory=in_memory, directories=directories, digests=verify)
    collections = opened.collections
    if backend == "fbgemm":
        collections = {name: collection.on_fbgemm() for name, collection in collections.items()}
    if model is not None:
        return _into(model, collections, opened, Path(path)).to(target).eval()
    if len(collections) == 1:
        alone: nn.Module = next(iter(collections.values()))
        return alone.to(target).eval()
    several = {name.replace(".", "_"): collection for name, collection in collections.items()}
    try:
        if len(several) < len(collections):
            raise KeyError(f"two of {list(collections)} have one name with dots as underscores")
        return nn.ModuleDict(several).to(target).eval()
    except KeyError as error:
        raise ValueError(
            f"{path}: its collections make no ModuleDict, load them into a model: {error.args[0]}"
        ) from error


def _into(
    model: nn.Module, collections: Mapping[str, PackedEmbeddingBagCollection], opened: Artifact, folder: Path
) -> nn.Module:
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
    if "" in collections:
        return collections[""]
    dense: Mapping[str, Tensor] = opened.dense
    prefixes = tuple(f"{name}." for name in collections)
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes)}
    if differing := sorted(wanted.keys() ^ dense.keys()):
        where = ", ".join(f"{key} (not in the {'artifact' if key in wanted else 'model'})" for key in differing[:5])
        raise ValueError(f"the dense tensors of {folder} do not fit the model: {where}")
    for key, tensor in dense.items():
        if (tensor.shape, tensor.dtype) != (wanted[key].shape, wanted[key].dtype):
            raise ValueError(
                f"the dense tensors of {folder} do not fit the model: {key} is {tensor.dtype} {list(tensor.shape)}, "
                f"the model's is {wanted[key].dtype} {list(wanted[key].shape)}"
            )
    # Loaded without collections, for theirs would check every line of their directories once more.
    for name in collections:
        _set(model, name, nn.Identity())
    model.load_state_dict(dict(dense), assign=True)
    for name, collection in collections.items():
        _set(model, name, collection)
    return model


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _described(collection: EmbeddingBagCollectionInterface) -> tuple[bool, list[tuple[str, int, int, list[str], str]]]:
    """Whether it is weighted, and name, rows, dimension, features and pooling of each table."""
    return collection.is_weighted(), [
        (t.name, t.num_embeddings, t.embedding_dim, list(t.feature_names), t.pooling.value)
        for t in collection.embedding_bag_configs()
    ]


def _collection(name: str, module: PackedEmbeddingBagCollection) -> dict[str, Any]:
    """The manifest's entry but for the files."""
    report = module.size_report()
    rows_per_width = {table.name: list(table.rows_per_width) for table in report.tables}
    return {
        "name": name,
        "is_weighted": module.is_weighted(),
        "output_dtype": str(module.output_dtype()).removeprefix("torch."),
        # The tensors' order, which need not be the configs': offsets in the tensors are by table.
        "packed_order": list(rows_per_width),
        "tables": [
            {
                "name": t.name,
                "num_embeddings": t.num_embeddings,
                "embedding_dim": t.embedding_dim,
                "feature_names": list(t.feature_names),
                "pooling": t.pooling.value,
                "rows_per_width": rows_per_width[t.name],
            }
            for t in module.embedding_bag_configs()
        ],
    }
