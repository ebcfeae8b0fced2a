"""One complete checkpoint on disk, as its manifest describes it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from torchrec_mpe.distributed.phases import prepare_retrain_, prepare_search_
from torchrec_mpe.files.document import DocumentFormat
from torchrec_mpe.modules.embedding_bag_collection import Phase
from torchrec_mpe.modules.search_config import SearchConfig
from torchrec_mpe.precision.frequency_counter import FrequencyCounter
from torchrec_mpe.precision.plan import PrecisionPlan
from torchrec_mpe.precision.row_initialization import RowInitialization

MANIFEST = "checkpoint.json"
COUNTS_FILE = "counts.safetensors"
PLAN_FILE = "plan.json"

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
    document = {**_FORMAT.header(), **content}
    path.write_text(json.dumps(document, indent=1) + "\n")


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest of a folder and check that the files it lists are there in full.

    Raises:
        ValueError: if the manifest is none of ours or of another version, or a file is missing or of another size.
        OSError: if it cannot be read.
    """
    document = _FORMAT.read(path / MANIFEST)
    try:
        checkpoint = _from_document(path, document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path / MANIFEST} is not a valid manifest: {error}") from error
    for name, size in document["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"checkpoint {path} is damaged: {name} is missing or not of {size} bytes")
    for name in (document["counts"], document["plan"]):
        if name is not None and not (path.parent / name).is_dir():
            raise ValueError(f"checkpoint {path} is damaged: {path.parent / name} is missing")
    return checkpoint


def search_config_to_json(config: SearchConfig | None) -> dict[str, Any] | None:
    """A search's settings as JSON values."""
    return None if config is None else {**asdict(config), "candidate_bits": list(config.candidate_bits)}


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
