"""Lookups that change nothing."""

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

from torchrec_mpe.cache.read_only_lookup import current_rows, pool_rows, slots_of_rows
from torchrec_mpe.ops.cache_tensors import WAYS, empty_directory, empty_store
from torchrec_mpe.ops.stored_rows import write_stored_rows_


@pytest.mark.parametrize("spill", [0, 40])
def test_slots_are_found_wherever_they_are(spill: int) -> None:
    sets, rows = 3, 1000
    directory = empty_directory(rows, sets, spill, lfu=False)
    g = torch.Generator().manual_seed(0)
    held: dict[int, int] = {}
    for slot in range(len(directory.slot_rows)):
        if slot % 5 == 0:
            continue  # stays empty
        row = next(
            int(r)
            for r in torch.randint(rows, (1000,), generator=g)
            if int(r) not in held and (slot >= WAYS * sets or int(r) % sets == slot // WAYS)
        )
        directory.slot_rows[slot] = row
        held[row] = slot
    found = slots_of_rows(directory, sets, torch.arange(rows))
    assert found.tolist() == [held.get(row, -1) for row in range(rows)]
    assert slots_of_rows(directory, sets, torch.arange(0)).shape == (0,)


def test_the_cached_copy_counts() -> None:
    store = empty_store(8, 100, 4)
    stored = torch.arange(100.0)[:, None].expand(100, 4).contiguous()
    numbers = torch.arange(100, dtype=torch.int32)
    write_stored_rows_([store], [stored], [[]], [(numbers, numbers)], [], 0, [0], [0], [0], False)
    directory = empty_directory(100, 1, 8, lfu=False)
    directory.slot_rows[4], directory.slot_rows[35] = 17, 3
    values = -torch.arange(40.0)[:, None].expand(40, 4)
    rows = current_rows(store, directory, 1, values, torch.tensor([3, 16, 17, 99]))
    torch.testing.assert_close(rows[:, 0], torch.tensor([-35.0, 16, -4, 99]), rtol=0.01, atol=0)


def test_pooling() -> None:
    rows = torch.tensor([[1.0, 2], [10, 20], [100, 200]])
    index, offsets = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 3, 3, 4])
    weights = torch.tensor([1.0, 2, 3, 4])

    def pooled(mode: PoolingMode, weights: torch.Tensor | None = None) -> list[float]:
        return pool_rows(rows, index, offsets, mode, weights)[:, 0].tolist()

    assert pooled(PoolingMode.SUM) == [21, 0, 100]
    assert pooled(PoolingMode.SUM, weights) == [51, 0, 400]
    assert pooled(PoolingMode.MEAN) == [7, 0, 100]
    assert pooled(PoolingMode.MEAN, weights) == pytest.approx([17, 0, 400])
    assert pooled(PoolingMode.NONE) == [1, 10, 10, 100]
