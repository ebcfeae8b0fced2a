"""One complete checkpoint on disk, as its manifest describes it."""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from torchrec_mpe.distributed.phases import prepare_retrain_, prepare_search_
from torchrec_mpe.files.digest import file_sha256
from torchrec_mpe.files.document import DocumentFormat, document_sha256
from torchrec_mpe.modules.embedding_bag_collection import Phase
from torchrec_mpe.modules.search_config import SearchConfig
from torchrec_mpe.precision.frequency_counter import FrequencyCounter
from torchrec_mpe.precision.plan import PrecisionPlan
from torchrec_mpe.precision.row_initialization import RowInitialization

MANIFEST = "checkpoint.json"
COUNTS_FILE = "counts.safetensors"
PLAN_FILE = "plan.json"

_READERS = 4  # threads of a rank that digest files

_FORMAT = DocumentFormat("torchrec_mpe.distributed.checkpoint", 1, "a checkpoint's manifest")


@dataclass(frozen=True)
class Checkpoint:
    """What :meth:`Checkpoints.newest` finds.

    Attributes:
        path (Path): its folder; the tensors in it are in torch.distributed.checkpoint's own format.
        step (int): as given to :meth:`Checkpoints.save`.
        phase (Phase): of the model's collections; Phase.PLAIN if the model has none of ours.
        position (Mapping[str, Any]): of the data, as given to :meth:`Checkpoints.save`.
        world_size (int): number of ranks that saved it.
        search_config (Optional[SearchConfig]): in the search phase, how the model was prepared.
        manifest (Mapping[str, Any]): all that the manifest holds, but for its header.
    """

    path: Path
    step: int
    phase: Phase
    position: Mapping[str, Any]
    world_size: int
    search_config: SearchConfig | None
    manifest: Mapping[str, Any] = field(repr=False)

    def counts(self) -> FrequencyCounter:
        """The counts that the model was prepared with.

        Raises:
            ValueError: if none were saved: only the search phase needs them.
        """
        if self.manifest["counts"] is None:
            raise ValueError(f"checkpoint {self.path} has no counts: it is of the {self.phase.value} phase")
        return FrequencyCounter.load(self.path.parent / self.manifest["counts"] / COUNTS_FILE)

    def plan(self) -> PrecisionPlan:
        """The precision plan that the model was prepared with.

        Raises:
            ValueError: if none was saved: only the retrain phase needs one.
        """
        if self.manifest["plan"] is None:
            raise ValueError(f"checkpoint {self.path} has no precision plan: it is of the {self.phase.value} phase")
        return PrecisionPlan.load(self.path.parent / self.manifest["plan"] / PLAN_FILE)

    def prepare_(self, model: nn.Module) -> nn.Module:
        """Put an unsharded model into the checkpoint's phase, with its counts and settings, or its plan.

        Args:
            model (nn.Module): holds EmbeddingBagCollections, not yet sharded; left as it is for the plain phase.

        Returns:
            nn.Module: ``model``, or its replacement if it is itself a plain EmbeddingBagCollection.

        Raises:
            ValueError: if the model is sharded, or its tables differ from those of the checkpoint.
            KeyError: if the model has a table that the counts or the plan lack.
        """
        if self.phase is Phase.SEARCH:
            return prepare_search_(model, self.counts(), self.search_config)
        if self.phase is Phase.RETRAIN:
            return prepare_retrain_(model, self.plan())
        return model


def write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Write a manifest into a folder that is not yet a checkpoint."""
    document = json.loads(json.dumps({**_FORMAT.header(), **content}))
    document["sha256"] = _sha256(document)
    path.write_text(json.dumps(document, indent=1) + "\n")


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest of a folder and check that the files it lists are there in full.

    Raises:
        ValueError: if the manifest is none of ours, damaged or of another version, or a file is missing or of another
            size.
        OSError: if it cannot be read.
    """
    document = _FORMAT.read(path / MANIFEST)
    try:
        # A checkpoint of an earlier release has no digests.
        if document.get("sha256", "") not in ("", _sha256({**_FORMAT.header(), **document})):
            raise ValueError("its digest is not that of its other entries")
        checkpoint = _from_document(path, document)
        files, shared = dict(document["files"]), [document["counts"], document["plan"]]
        _check_names([*files, *(name for name in shared if name is not None)])
        digests = dict(document.get("file_sha256", {}))
        if not digests.keys() <= files.keys() or not all(isinstance(digest, str) for digest in digests.values()):
            raise ValueError(f"it has digests of {sorted(digests)!s:.200}, and files {sorted(files)!s:.200}")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path / MANIFEST} is not a valid manifest: {error}") from error
    for name, size in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"checkpoint {path} is damaged: {name} is missing or not of {size} bytes")
    for name in shared:
        if name is not None and not (path.parent / name).is_dir():
            raise ValueError(f"checkpoint {path} is damaged: {path.parent / name} is missing")
    return checkpoint


def damage(checkpoint: Checkpoint, rank: int, world_size: int) -> str | None:
    """Which file of a checkpoint has another digest than it was saved with, in one sentence; None if none has.

    Everything is read, by several threads, each file on one of the ranks.

    Args:
        checkpoint (Checkpoint): whose files are there in full.
        rank, world_size (int): which of the files, and of what is shared with other checkpoints, this is to read.
    """
    digests = [(checkpoint.path / name, digest) for name, digest in checkpoint.manifest.get("file_sha256", {}).items()]
    for name, file in ((checkpoint.manifest["counts"], COUNTS_FILE), (checkpoint.manifest["plan"], PLAN_FILE)):
        if name is not None:  # called by its digest
            digests.append((checkpoint.path.parent / name / file, name.rpartition("-")[2]))

    def differs(expected: tuple[Path, str]) -> str | None:
        file, digest = expected
        try:
            wrong = not file_sha256(file).startswith(digest)
        except OSError as error:
            return f"{file}: {error.strerror}"
        return f"{file} has another digest" if wrong else None

    with ThreadPoolExecutor(_READERS) as readers:
        found = next(filter(None, readers.map(differs, sorted(digests)[rank::world_size])), None)
    return None if found is None else f"checkpoint {checkpoint.path} is damaged: {found}"


def search_config_to_json(config: SearchConfig | None) -> dict[str, Any] | None:
    """A search's settings as JSON values."""
    return None if config is None else {**asdict(config), "candidate_bits": list(config.candidate_bits)}


def _sha256(document: Mapping[str, Any]) -> str:
    return document_sha256(document, allow_nan=True)  # a schedule's best loss may be infinite


def _check_names(names: Iterable[Any]) -> None:
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"it lists the file {name!r:.100}")


def _from_document(path: Path, document: Mapping[str, Any]) -> Checkpoint:
    config = document["search_config"]
    if config is not None:
        initialization = RowInitialization(**config["initialization"])
        bits = tuple(config["candidate_bits"])
        config = SearchConfig(**{**config, "candidate_bits": bits, "initialization": initialization})
    return Checkpoint(
        path,
        int(document["step"]),
        Phase(document["phase"]),
        dict(document["position"]),
        int(document["world_size"]),
        config,
        document,
    )
