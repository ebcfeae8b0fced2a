"""Writing packed rows, on every backend."""

import pytest
import torch
from torch import Tensor

from torchrec_mpe.ops import library
from torchrec_mpe.ops.backends import available_backends
from torchrec_mpe.ops.update_rows import update_rows_

BACKENDS = available_backends("update_rows_")


def weights_of(size: int = 1000) -> Tensor:
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_bytes", [1, 3, 64, 130])
def test_writes_these_bytes_and_no_others(backend: str, row_bytes: int) -> None:
    weights = weights_of()
    starts = [1000 - row_bytes, 0, 300, 300 + row_bytes]
    rows = torch.arange(4 * row_bytes).view(4, row_bytes).to(torch.uint8)
    expected = weights.tolist()
    for start, row in zip(starts, rows.tolist(), strict=True):
        expected[start : start + row_bytes] = row
    update_rows_(weights, torch.tensor(starts), rows, backend=backend)
    assert weights.tolist() == expected
    update_rows_(weights, torch.tensor([], dtype=torch.int64), rows[:0], backend=backend)
    assert weights.tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_are_written_at_a_time(backend: str) -> None:
    weights = torch.zeros(5 * 40_000 + 64, dtype=torch.uint8)
    order = torch.randperm(40_000, generator=torch.Generator().manual_seed(1))
    rows = (order.unsqueeze(1) + torch.tensor([0, 1, 2, 3, 4])).to(torch.uint8)
    noncontiguous = rows.t().contiguous().t()
    update_rows_(weights, 5 * order, noncontiguous, backend=backend)
    expected = (torch.arange(40_000).unsqueeze(1) + torch.arange(5)).to(torch.uint8).flatten()
    assert torch.equal(weights[: 5 * 40_000], expected) and not weights[5 * 40_000 :].any()


@pytest.mark.parametrize(
    ("starts", "row_bytes", "message"),
    [([0, -1], 4, "leave the 1000"), ([997, 5], 4, "leave the 1000"), ([2**62, 0], 4, "leave"), ([0], 4, "2|as many")],
)
def test_what_would_be_written_outside_is_refused(starts: list[int], row_bytes: int, message: str) -> None:
    weights = weights_of()
    rows = torch.zeros(2, row_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        update_rows_(weights, torch.tensor(starts), rows)
    if library.is_loaded():
        with pytest.raises(ValueError):
            torch.ops.torchrec_mpe.update_rows_(weights, torch.tensor(starts), rows)
    assert torch.equal(weights, weights_of())


def test_misuse() -> None:
    weights, starts, rows = weights_of(), torch.tensor([0, 8]), torch.zeros(2, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"weights must be torch.uint8, got torch.float32"):
        update_rows_(weights.float(), starts, rows)
    with pytest.raises(TypeError, match=r"starts must be torch.int64"):
        update_rows_(weights, starts.int(), rows)
    with pytest.raises(TypeError, match=r"rows must be torch.uint8"):
        update_rows_(weights, starts, rows.float())
    with pytest.raises(ValueError, match=r"weights must be \[P\], contiguous"):
        update_rows_(weights[::2], starts, rows)
    with pytest.raises(ValueError, match=r"rows of at least one byte, got \[2, 0\]"):
        update_rows_(weights, starts, rows[:, :0])
    with pytest.raises(ValueError, match="on one device, got cpu, meta and cpu"):
        update_rows_(weights, starts.to("meta"), rows)
    assert torch.equal(weights, weights_of())


@pytest.mark.skipif(not library.is_loaded(), reason="the operators are not built")
def test_op_is_registered_as_torch_wants() -> None:
    rows = torch.ones(2, 4, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.torchrec_mpe.update_rows_.default, (weights_of(), torch.tensor([0, 8]), rows))
    with pytest.raises(TypeError, match="uint8"):
        torch.ops.torchrec_mpe.update_rows_(weights_of().float(), torch.tensor([0, 8]), rows)
