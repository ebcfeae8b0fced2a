"""Where the bit-widths of an artifact come from."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from torchrec_mpe.inference.artifact.tensor_files import sha256_of_tensor
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.precision.plan import PrecisionPlan
from torchrec_mpe.upstream.versions import __version__, installed_versions


def provenance(plan: PrecisionPlan | None) -> dict[str, Any]:
    """The manifest's entry: versions of what is installed here, and digests of the plan and of its counts."""
    versions = {**installed_versions(), "torchrec-mpe": __version__}
    if plan is None:
        return {"versions": versions, "precision_plan": None}
    counts = plan.provenance.get("counts_sha256", [])
    return {
        "versions": versions,
        "precision_plan": {
            "sha256": plan_sha256(plan),
            "counts_sha256": [counts] if isinstance(counts, str) else list(counts),
            "provenance": dict(plan.provenance),
        },
    }


def plan_sha256(plan: PrecisionPlan) -> str:
    """A digest of all of a plan but its provenance, hexadecimal; the same for a plan that was saved and loaded."""
    tables = {
        name: [
            table.num_embeddings,
            table.embedding_dim,
            list(table.bounds),
            list(table.bits),
            None if table.order is None else sha256_of_tensor(table.order),
        ]
        for name, table in plan.tables.items()
    }
    initialization = [plan.initialization.seed, plan.initialization.std]
    content = [list(plan.candidate_bits), plan.zero_row, initialization, tables]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_plan(plan: PrecisionPlan, collections: Iterable[PackedEmbeddingBagCollection]) -> None:
    """See that packed collections have the shapes and bit-widths of a plan; the plan may have more tables.

    Raises:
        ValueError: naming the table, if one is not the plan's.
    """
    for size in (size for collection in collections for size in collection.size_report().tables):
        planned = plan.tables.get(size.name)
        if planned is None:
            raise ValueError(f"table {size.name} is not in the precision plan, which has {', '.join(plan.tables)}")
        found = (size.num_embeddings, size.embedding_dim, list(size.rows_per_width))
        wanted = (planned.num_embeddings, planned.embedding_dim, planned.rows_per_width())
        if found != wanted:
            raise ValueError(
                f"table {size.name} is not packed as the precision plan says: rows, dimension and rows of each "
                f"bit-width are {found}, the plan's {wanted}"
            )
