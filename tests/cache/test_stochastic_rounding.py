"""Why rows are rounded stochastically on their way to the store: training end to end, against fp32."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType

from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.table_spec import CachedTableSpec

STEPS, UPDATE = 80, 0.008
TABLES = 32  # alike but for their random numbers
DIM = 16


def drift(*, stochastic_rounding: bool, bits: int) -> torch.Tensor:
    """By how much more than in fp32 a row changes by 80 small updates, written to the store after each; [tables, dim].

    A step of the grid is about 1/8 at 4 bits, the update a seventeenth of it.
    """
    config = CacheConfig(bits=4 if bits == 4 else 8, load_factor=0.01, stochastic_rounding=stochastic_rounding, seed=5)
    cached = CachedTableBatchedEmbeddingBags(
        [CachedTableSpec(f"t{t}", 64, DIM, config) for t in range(TABLES)],
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=1.0,
    )
    start = torch.linspace(-0.9, 0, DIM).repeat(64, 1)
    start[:, 0], start[:, -1] = -1, 1
    for t in range(TABLES):
        cached.write_rows(t, 0, start)
    first = torch.stack([cached.read_rows(t, 3, 1)[0] for t in range(TABLES)])
    gradient = torch.full((1, TABLES * DIM), -UPDATE)
    gradient.view(TABLES, DIM)[:, [0, -1]] = 0  # its range, and so its grid, stay
    others = torch.arange(32, 64).repeat(TABLES)
    for _ in range(STEPS):
        cached(torch.full((TABLES,), 3), torch.arange(TABLES + 1)).backward(gradient)
        cached(others, torch.arange(TABLES + 1) * 32).backward(torch.zeros_like(gradient))  # evicts row 3
    assert all(statistics.num_evictions == 2 * STEPS - 1 for statistics in cached.cache_statistics())
    last = torch.stack([cached.read_rows(t, 3, 1)[0] for t in range(TABLES)])
    return (last - first - STEPS * UPDATE)[:, 1:-1]


@pytest.mark.parametrize("bits", [4, 8])
def test_small_updates_add_up_to_what_they_are_in_fp32(bits: int) -> None:
    off = drift(stochastic_rounding=True, bits=bits)
    grid = 2 / (2**bits - 1)
    # A rounding has variance of at most grid^2 / 4 (of the next coarser grid, 1/8 more), 80 of them are independent;
    # the mean over tables and columns is within 4 of its standard errors.
    bound = 4 * (grid * 1.125 / 2) * STEPS**0.5 / off.numel() ** 0.5
    assert bound < 0.35 * STEPS * UPDATE
    assert off.mean().abs() < bound
    assert off.std() > 0.1 * grid  # it was rounded


def test_small_updates_get_lost_in_rounding_to_the_nearest() -> None:
    off = drift(stochastic_rounding=False, bits=4)
    assert (off + STEPS * UPDATE).abs().max() < 1e-6  # rows are where they were
