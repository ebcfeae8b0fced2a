"""A checkpoint that two ranks wrote, each its shards, converted in one process."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from tests.distributed.equality import CW, RW, TW, Case, enter, prepared_model, shard
from tests.distributed.ranks import Ranks
from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.inference.convert.checkpoint_files import open_checkpoint
from torchrec_mpe.inference.convert.checkpoint_tables import find_tables
from torchrec_mpe.inference.convert.convert import convert_checkpoint

CASE = Case((RW, TW, CW, RW), phase="plain")


def save(folder: str) -> list[tuple[str, int, int, np.ndarray[Any, Any]]]:
    """Save a sharded model; this rank's shards: table, first row, first column, values."""
    model = shard(prepared_model(CASE), CASE)
    enter(model, CASE)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    return [
        (name, row, column, values.detach().numpy())
        for module in model.modules()
        if isinstance(module, ShardedMPEEmbeddingBagCollection)
        for name, row, column, values in module.local_shards()
    ]


def test_shards_are_put_together(two_ranks: Ranks, tmp_path: Path) -> None:
    shards = [shard for rank in two_ranks.run(save, str(tmp_path / "dcp")) for shard in rank]
    assert len({name for name, *_ in shards}) == 4 < len(shards)
    files = open_checkpoint(tmp_path / "dcp", allow_pickle=True)
    for table in find_tables(files):
        assert table.key is not None
        rows = files.rows(table.key, 0, table.config.num_embeddings)
        for name, row, column, values in shards:
            if name == table.config.name:
                part = rows[row : row + values.shape[0], column : column + values.shape[1]]
                assert torch.equal(part, torch.from_numpy(values))
    found = convert_checkpoint(tmp_path / "dcp", max_error=0.05, allow_pickle=True)
    assert all(errors.relative_rms is not None and errors.relative_rms <= 0.05 for errors in found.errors.values())
