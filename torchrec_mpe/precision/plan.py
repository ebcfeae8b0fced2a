"""PrecisionPlan: the bit-width of every row of every table, as a file that people can read."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from torchrec_mpe.files.atomic import atomic_file
from torchrec_mpe.files.digest import file_sha256
from torchrec_mpe.files.document import DocumentFormat
from torchrec_mpe.files.text_table import text_table
from torchrec_mpe.packing.bit_widths import TableBitWidths, check_candidate_bits
from torchrec_mpe.packing.size import SizeReport, packed_bytes
from torchrec_mpe.precision.row_initialization import RowInitialization
from torchrec_mpe.upstream.versions import installed_versions

_FORMAT = DocumentFormat("torchrec_mpe.precision_plan", 1, "a precision plan")

ZeroRow = Literal["learned", "zero"]
"""What a 0-bit row reads: a vector that its table learns, or zero."""


@dataclass(frozen=True)
class PrecisionPlan:
    """Bit-widths of all tables, with what retraining needs besides them.

    Attributes:
        tables (Mapping[str, TableBitWidths]): widths per table name.
        candidate_bits (tuple[int, ...]): the widths that were open to choice.
        zero_row (str): "learned" or "zero", what a 0-bit row reads.
        initialization (RowInitialization): the rows' initial values, to which retraining returns.
        provenance (Mapping[str, Any]): how the plan was made, JSON values: method, settings, digest of the counts,
            library versions.

    Example::

        plan = sample_precision(model)
        plan.save("plan.json")
        print(PrecisionPlan.load("plan.json").summary())
    """

    tables: Mapping[str, TableBitWidths]
    candidate_bits: tuple[int, ...]
    zero_row: ZeroRow = "learned"
    initialization: RowInitialization = field(default_factory=RowInitialization)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_candidate_bits(self.candidate_bits)
        if not self.tables:
            raise ValueError("a precision plan needs at least one table")
        if self.zero_row not in ("learned", "zero"):
            raise ValueError(f"zero_row must be 'learned' or 'zero', got {self.zero_row!r}")
        for name, table in self.tables.items():
            if not set(table.bits) <= set(self.candidate_bits):
                raise ValueError(
                    f"table {name} has bit-widths {sorted(set(table.bits))}, candidates are {self.candidate_bits}"
                )

    @property
    def average_bits(self) -> float:
        """Mean bit-width over all elements of all tables, without directories, scales and padding."""
        elements = {name: t.num_embeddings * t.embedding_dim for name, t in self.tables.items()}
        return sum(t.average_bits * elements[name] for name, t in self.tables.items()) / sum(elements.values())

    def size_report(self) -> SizeReport:
        """The exact bytes of the packed tables that this plan leads to."""
        return packed_bytes(self.tables, learned_zero_rows=self.zero_row == "learned")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` (JSON), and ``<path>.<digest>.ranks.safetensors`` for ids that are not in frequency order."""
        order = {name: t.order for name, t in self.tables.items() if t.order is not None}
        document: dict[str, Any] = {
            **_FORMAT.header(),
            "average_bits": round(self.average_bits, 6),
            "candidate_bits": list(self.candidate_bits),
            "zero_row": self.zero_row,
            "initialization": {"seed": self.initialization.seed, "std": self.initialization.std},
            "tables": {
                name: {
                    "num_embeddings": t.num_embeddings,
                    "embedding_dim": t.embedding_dim,
                    "rows": "ranked" if t.order is None else "mapped",
                    "bounds": list(t.bounds),
                    "bits": list(t.bits),
                }
                for name, t in self.tables.items()
            },
            "provenance": {**self.provenance, "versions": installed_versions()},
        }
        old = set(Path(path).parent.glob(_ranks_file(path, "*")))
        if order:
            # Named by its digest: until the JSON is replaced, an older plan keeps its own.
            digest = hashlib.sha256(save(order)).hexdigest()
            document["ranks_sha256"] = digest
            document["ranks_file"] = _ranks_file(path, digest[:12])
            sidecar = Path(path).parent / document["ranks_file"]
            with atomic_file(sidecar) as temporary:
                save_file(order, temporary)
            old.discard(sidecar)
        with atomic_file(path) as temporary:
            temporary.write_text(_readable_json(document))
        for file in old:
            file.unlink()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PrecisionPlan":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is no precision plan, of another version, incomplete, or has unknown entries.
            FileNotFoundError: if it, or the file of places that it needs, is missing.
        """
        document = _FORMAT.read(Path(path))
        try:
            return _from_document(document, path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a valid precision plan: {error}") from error

    def summary(self) -> str:
        """A table for people: rows of each width per table, average bits, packed bytes and compression."""
        report = self.size_report()
        sizes = {size.name: size for size in report.tables}
        widths = sorted({b for t in self.tables.values() for b in t.bits})
        header = ["table", "rows", "dim", *(f"{b}-bit" for b in widths), "avg bits", "bytes", "ratio"]
        lines = [header]
        for name, t in self.tables.items():
            rows = t.rows_per_width()
            size = sizes[name]
            lines.append(
                [
                    name,
                    f"{t.num_embeddings:,}",
                    str(t.embedding_dim),
                    *(f"{rows[b]:,}" for b in widths),
                    f"{t.average_bits:.3f}",
                    f"{size.total:,}",
                    f"{size.compression_ratio:.1f}x",
                ]
            )
        total_rows = sum(t.num_embeddings for t in self.tables.values())
        per_width = [sum(t.rows_per_width()[b] for t in self.tables.values()) for b in widths]
        lines.append(
            [
                "all",
                f"{total_rows:,}",
                "",
                *(f"{n:,}" for n in per_width),
                f"{self.average_bits:.3f}",
                f"{report.total:,}",
                f"{report.compression_ratio:.1f}x",
            ]
        )
        return text_table(lines)


def _ranks_file(path: str | os.PathLike[str], digest: str) -> str:
    return f"{Path(path).name}.{digest}.ranks.safetensors"


def _readable_json(document: Mapping[str, Any]) -> str:
    """Indented JSON with each list on one line, so that bounds and bits can be read side by side."""
    lists: list[str] = []

    def shorten(value: Any) -> Any:
        if isinstance(value, list):
            lists.append(json.dumps(value))
            return f"@list{len(lists) - 1}@"
        return {k: shorten(v) for k, v in value.items()} if isinstance(value, dict) else value

    text = json.dumps(shorten(dict(document)), indent=2)
    for k, line in enumerate(lists):
        text = text.replace(f'"@list{k}@"', line, 1)
    return text + "\n"


def _from_document(document: Mapping[str, Any], path: str | os.PathLike[str]) -> PrecisionPlan:
    known = {
        "average_bits", "candidate_bits", "zero_row", "initialization", "tables", "provenance", "ranks_file",
        "ranks_sha256",
    }  # fmt: skip
    if unknown := set(document) - known:
        raise ValueError(f"unknown entries {sorted(unknown)}")
    order: Mapping[str, Tensor] = {}
    if "ranks_sha256" in document:
        if document["ranks_file"] != _ranks_file(path, document["ranks_sha256"][:12]):
            raise ValueError(f"it names {document['ranks_file']!r} as the file of its places")
        sidecar = Path(path).parent / document["ranks_file"]
        if not sidecar.exists():
            raise FileNotFoundError(f"{path} needs {sidecar.name} beside it, the order of its rows")
        if file_sha256(sidecar) != document["ranks_sha256"]:
            raise ValueError(f"{sidecar} does not belong to it: the digest differs")
        try:
            order = load_file(sidecar)
        except SafetensorError as error:
            raise ValueError(f"{sidecar} cannot be read: {error}") from error
    tables: dict[str, TableBitWidths] = {}
    for name, entry in document["tables"].items():
        if entry["rows"] not in ("ranked", "mapped"):
            raise ValueError(f"table {name} has rows {entry['rows']!r}, not 'ranked' or 'mapped'")
        tables[name] = TableBitWidths(
            entry["num_embeddings"],
            entry["embedding_dim"],
            tuple(entry["bounds"]),
            tuple(entry["bits"]),
            order[name] if entry["rows"] == "mapped" else None,
        )
    initialization = RowInitialization(document["initialization"]["seed"], document["initialization"]["std"])
    return PrecisionPlan(
        tables, tuple(document["candidate_bits"]), document["zero_row"], initialization, document["provenance"]
    )
