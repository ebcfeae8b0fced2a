import copy

import pytest
import torch

from torchrec_mpe.ops.huge_pages import zeros_in_huge_pages


@pytest.mark.parametrize("rows", [0, 3, 200_000])
def test_zeros_that_can_be_written_and_copied(rows: int) -> None:
    zeros = zeros_in_huge_pages(rows, 67)
    assert zeros.shape == (rows, 67)
    assert zeros.dtype == torch.uint8
    assert zeros.is_contiguous()
    assert not zeros.any()
    zeros[rows // 2 :] = 7
    copied = copy.deepcopy(zeros)
    zeros.zero_()
    assert (copied[rows // 2 :] == 7).all()


def test_large_tensors_begin_with_a_huge_page() -> None:
    assert zeros_in_huge_pages(200_000, 67).data_ptr() % (2 << 20) == 0
