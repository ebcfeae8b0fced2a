"""Errors of quantized rows, and quantized rows, by hand."""

import math

import torch

from torchrec_mpe.precision.row_errors import RowErrors, quantized_rows


def test_errors_by_hand() -> None:
    errors = RowErrors()
    errors.add(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]), torch.tensor([9]))
    errors.add(torch.tensor([[0.0, 5.0]]), torch.tensor([[0.0, 5.0]]), torch.tensor([1]))
    assert errors.weighted_relative_rms == math.sqrt(9 / 250)
    assert errors.relative_rms == math.sqrt(1 / 50)
    assert errors.max_abs_error == 1.0
    assert errors.decisive_relative_rms == errors.weighted_relative_rms


def test_without_lookups_all_rows_decide() -> None:
    errors = RowErrors()
    errors.add(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]), torch.tensor([0]))
    assert errors.weighted_relative_rms is None
    assert errors.decisive_relative_rms == errors.relative_rms == 0.2


def test_rows_of_zeros_have_no_relative_error() -> None:
    errors = RowErrors()
    errors.add(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2))
    assert errors.relative_rms is None and errors.decisive_relative_rms == 0.0
    errors.add(torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2))
    assert errors.decisive_relative_rms == math.inf


def test_quantized_rows_by_hand() -> None:
    alpha = torch.tensor([0.0, 1.0, 0.5, 1, 1, 1, 1, 1, 1])
    rows = torch.tensor([[7.0, -7.0], [0.6, -0.4], [0.6, -9.0]])
    beta, zero = torch.tensor([0.1, 0.0]), torch.tensor([4.0, 5.0])
    found = quantized_rows(rows, torch.tensor([0, 1, 2], dtype=torch.uint8), alpha, beta, zero)
    # 1 bit: codes -1 and 0; 2 bits: -2 to 1.
    torch.testing.assert_close(found, torch.tensor([[4.0, 5.0], [0.1, 0.0], [0.6, -1.0]]))
    assert quantized_rows(rows, torch.zeros(3, dtype=torch.uint8), alpha, beta, None).abs().max() == 0
