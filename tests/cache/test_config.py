"""How stores and caches are configured."""

from typing import Any

import pytest
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm

from torchrec_mpe.cache.config import CacheConfig, parse_cache_config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 2}, "bits must be 4 or 8, got 2"),
        ({"load_factor": 0.0}, "load_factor must be above 0"),
        ({"load_factor": 1.01}, "at most 1, got 1.01"),
        ({"load_factor": float("nan")}, "load_factor must be"),
        ({"optimizer_state_dtype": "fp16"}, "must be one of fp32, bf16, ue6m2, got 'fp16'"),
        ({"location": "disk"}, "location must be host or device, got 'disk'"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**63}, "seed must be from 0"),
        ({"half_life": 0.0}, "half_life must be positive"),
        ({"half_life": float("nan")}, "half_life must be positive"),
        ({"spill_rows": -1}, "spill_rows must not be negative"),
    ],
)
def test_values_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheConfig(**wrong)


@pytest.mark.parametrize("load_factor", [1e-9, 0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 100, 1000, 4096, 1_000_000])
def test_the_cache_holds_what_the_load_factor_says(rows: int, load_factor: float) -> None:
    sets = CacheConfig(load_factor=load_factor).num_sets(rows)
    largest_set = -(-rows // sets)  # rows r % sets
    assert sets >= 1 and 32 * sets >= int(load_factor * rows)
    assert 32 * sets < load_factor * rows + 3 * 32 or sets == 1
    if load_factor == 1:
        assert largest_set <= 32


def test_a_tables_random_numbers_are_its_own() -> None:
    seeds = {CacheConfig(seed=seed).table_seed(name) for seed in (0, 1) for name in ("a", "b", "1 a")}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert CacheConfig(seed=1).table_seed("a") == CacheConfig(bits=4, seed=1).table_seed("a")


@pytest.mark.parametrize(
    ("optimizer", "elements", "dtype", "expected"),
    [
        (EmbOptimType.EXACT_ROWWISE_ADAGRAD, 1, None, "ue6m2"),
        (EmbOptimType.EXACT_ADAGRAD, 16, None, "bf16"),
        (EmbOptimType.ADAM, 16, None, "bf16"),
        (EmbOptimType.PARTIAL_ROWWISE_ADAM, 1, None, "bf16"),
        (EmbOptimType.EXACT_ROWWISE_ADAGRAD, 1, "fp32", "fp32"),
    ],
)
def test_how_states_are_stored(optimizer: EmbOptimType, elements: int, dtype: Any, expected: str) -> None:
    assert CacheConfig(optimizer_state_dtype=dtype).state_dtype(optimizer, elements) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8:0.05", CacheConfig(8, 0.05, CacheAlgorithm.LRU)),
        ("int4:0.01", CacheConfig(4, 0.01, CacheAlgorithm.LFU)),
        ("int4:1:lru", CacheConfig(4, 1.0, CacheAlgorithm.LRU)),
        ("int8:1e-3:lfu", CacheConfig(8, 0.001, CacheAlgorithm.LFU)),
    ],
)
def test_parsing(text: str, expected: CacheConfig) -> None:
    assert parse_cache_config(text) == expected


@pytest.mark.parametrize(
    "text", ["", "int8", "int8:", "int2:0.1", "int8:0", "int8:1.5", "int8:x", "int8:nan", "8:0.1", "int8:0.1:"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no cache: use int8:FRACTION"):
        parse_cache_config(text)
    with pytest.raises(ValueError, match="is no cache"):
        parse_cache_config("int8:0.1:fifo")
