"""The code of docs/cache.md runs, and its formula of bytes is exact."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm

from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.table_spec import CachedTableSpec

PAGE = Path(__file__).parents[2] / "docs" / "cache.md"
SWAP_IN, COUNTERS, FORMULA = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.supports("training: cached tables, the code of docs/cache.md", "CPU")
def test_swap_in_and_counters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {}
    try:
        exec(SWAP_IN + COUNTERS, names)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert bool(torch.isfinite(names["loss"]))
    assert set(names["statistics"]) == {"t_user", "t_item"}
    assert all(s.num_calls == 20 and s.num_unique_misses > 0 for s in names["statistics"].values())
    assert re.search(r"^t_user hit rate \d+\.\d%", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(8, 0.05),
        CacheConfig(4, 0.01, CacheAlgorithm.LFU),
        CacheConfig(8, 1.0),
        CacheConfig(4, 0.1, spill_rows=9),
    ],
)
def test_bytes(config: CacheConfig) -> None:
    names: dict[str, Any] = {}
    exec(FORMULA, names)
    optimizer = EmbOptimType.EXACT_ROWWISE_ADAGRAD
    tbe = CachedTableBatchedEmbeddingBags([CachedTableSpec("t", 5000, 16, config)], optimizer=optimizer)
    tbe(torch.arange(0, 5000, 10), torch.arange(501)).sum().backward()
    kinds = tbe.bytes_by_kind()
    spill_rows, rest = divmod(kinds["spill"], 4 * 16)
    assert rest == 0
    assert names["training_bytes"](5000, 16, config, spill_rows) == sum(kinds.values())
