"""What a job was started with, kept beside its results: a restart and a later stage go on with the same."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torchrec_mpe.app.training.settings import Settings
from torchrec_mpe.errors import UserError
from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.files.document import DocumentFormat

JOB_FILE = "job.json"
_FORMAT = DocumentFormat("torchrec_mpe.job", 1, "the settings of a job")


@dataclass(frozen=True, kw_only=True)
class JobSettings(Settings):
    """The settings that a stage's result depends on.

    Attributes:
        stage (str): "search" or "retrain".
        log (Mapping[str, Any]): the log and how it is read, options of the search; empty in a retraining.
        data (str): the folder of prepared data.
        search (Optional[str]): the search's folder, of a retraining.

    ``resets`` are the phases of retraining, 0 in a search.
    """

    stage: str
    log: Mapping[str, Any]
    data: str
    search: str | None

    def save(self, folder: Path) -> None:
        """Write the job file of a folder."""
        with atomic_file(folder / JOB_FILE) as temporary:
            document = {**_FORMAT.header(), **asdict(self)}
            temporary.write_text(json.dumps(document, indent=2, default=str) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "JobSettings":
        """Read the job file of a folder.

        Raises:
            UserError: if there is none, or it is none of ours.
        """
        file = folder / JOB_FILE
        try:
            document = _FORMAT.read(file)
        except FileNotFoundError:
            raise UserError(f"{folder} holds no {JOB_FILE}: it is no folder of a search or a retraining") from None
        except ValueError as error:
            raise UserError(str(error)) from error
        try:
            return cls(**document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged: {error}") from error

    def check_same(self, folder: Path, *, trained: bool) -> None:
        """Find out whether the job in a folder, if there is one, is this one.

        Args:
            folder (Path): of a search or a retraining.
            trained (bool): whether it holds checkpoints; otherwise it holds prepared data at most, and only the
                settings of the data have to be the same.

        Raises:
            UserError: naming what differs; or if the folder is a file, an artifact or prepared data.
        """
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is no folder: choose another")
        if (folder / "manifest.json").exists():
            raise UserError(f"{folder} holds an artifact or prepared data, no {self.stage}: choose another folder")
        if not (folder / JOB_FILE).exists():
            return
        before, now = self.load(folder)._comparable(trained), self._comparable(trained)
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{folder} belongs to a job with {name.replace('_', ' ')} {before.get(name)}, and this one has "
                    f"{now.get(name)}: a job goes on with the settings it was started with; choose another folder for "
                    "another job"
                )

    def _comparable(self, trained: bool) -> dict[str, Any]:
        """Settings by name, as they come back from a file."""
        names = [field.name for field in fields(self)] if trained else ["stage", "data"]
        values = {**{name: getattr(self, name) for name in names if name != "log"}, **self.log}
        comparable: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return comparable
