"""An artifact says where its bit-widths come from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import torchrec_mpe as mpe
from tests.inference.models import tables
from torchrec_mpe.inference.artifact.provenance import plan_sha256
from torchrec_mpe.precision.from_frequencies import cut_precision, uniform_precision
from torchrec_mpe.precision.row_initialization import RowInitialization


def _plan() -> mpe.PrecisionPlan:
    g = torch.Generator().manual_seed(0)
    counts = {t.name: torch.randint(0, 9, (t.num_embeddings,), generator=g) for t in tables()}
    return cut_precision(counts, tables(), 4, 0.5)


def test_the_plan_is_kept_by_its_digest(tmp_path: Path) -> None:
    plan = _plan()
    model = mpe.MPEEmbeddingBagCollection(tables())
    mpe.prepare_retrain_(model, plan)
    mpe.save(mpe.emit_inference_model(model), tmp_path / "artifact", plan=plan)
    kept = json.loads((tmp_path / "artifact" / "manifest.json").read_text())["provenance"]["precision_plan"]
    assert kept["counts_sha256"] == [plan.provenance["counts_sha256"]] and kept["provenance"]["method"] == "cut"
    plan.save(tmp_path / "plan.json")
    assert kept["sha256"] == plan_sha256(mpe.PrecisionPlan.load(tmp_path / "plan.json"))
    mpe.load(tmp_path / "artifact")


def test_another_plan_is_refused(tmp_path: Path) -> None:
    model = mpe.MPEEmbeddingBagCollection(tables())
    mpe.prepare_retrain_(model, _plan())
    emitted = mpe.emit_inference_model(model)
    with pytest.raises(ValueError, match="table t1 is not packed as the precision plan says"):
        mpe.save(emitted, tmp_path / "artifact", plan=uniform_precision(tables(), 3))
    with pytest.raises(ValueError, match="table t3 is not in the precision plan, which has t1, t2"):
        mpe.save(emitted, tmp_path / "artifact", plan=replace(_plan(), tables=dict(list(_plan().tables.items())[:2])))
    assert not list(tmp_path.iterdir())


def test_digests_tell_plans_apart() -> None:
    plan = _plan()
    t1 = plan.tables["t1"]
    assert t1.order is not None
    others = [
        replace(plan, zero_row="zero"),
        replace(plan, initialization=RowInitialization(seed=7)),
        replace(plan, tables={**plan.tables, "t1": replace(t1, order=t1.order.flip(0))}),
        replace(plan, tables={**plan.tables, "t1": replace(t1, bits=tuple(reversed(t1.bits)))}),
    ]
    assert len({plan_sha256(p) for p in (plan, *others)}) == 5
    assert plan_sha256(replace(plan, provenance={})) == plan_sha256(plan)
