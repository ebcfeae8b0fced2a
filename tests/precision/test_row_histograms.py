"""Histograms of rows, against quantizing every element."""

from itertools import pairwise

import pytest
import torch

from torchrec_mpe.precision.row_histograms import RowHistograms, candidate_step_sizes, read_histograms

BOUNDS = (0, 10, 200, 3000)


def heavy_tailed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows whose spread falls with their rank, off center; ranks that are no ids; Zipf weights by id."""
    g = torch.Generator().manual_seed(3)
    ranks = torch.randperm(3000, generator=g).to(torch.int32)
    spread = 2 * (1 + ranks.float()) ** -0.4
    rows = torch.randn(3000, 6, generator=g) * spread.unsqueeze(1) + torch.linspace(-0.3, 0.3, 6)
    return rows, ranks, 1e4 / (1 + ranks.double())


def histograms() -> tuple[RowHistograms, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, ranks, weights = heavy_tailed()
    return read_histograms("t", lambda a, b: rows[a:b], 6, BOUNDS, ranks, weights), rows, ranks, weights


@pytest.mark.parametrize("bits", range(1, 9))
def test_errors_are_those_of_every_element(bits: int) -> None:
    found, rows, ranks, weights = histograms()
    alphas = candidate_step_sizes(found, 5)[bits - 1]
    shifts = torch.tensor([0.0, 0.11], dtype=torch.float64)
    errors = found.errors(bits, alphas, shifts)
    assert errors.shape == (2, 3, 5)
    center = (weights @ rows.double()) / weights.sum()
    for h, shift in enumerate(shifts.tolist()):
        for a, alpha in enumerate(alphas.tolist()):
            beta = center + shift
            codes = ((rows.double() - beta) / alpha).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            square = weights * (codes * alpha + beta - rows).square().sum(1)
            for s, (low, high) in enumerate(pairwise(BOUNDS)):
                exact = float(square[(ranks >= low) & (ranks < high)].sum())
                assert float(errors[h, s, a]) == pytest.approx(exact, rel=0.02)


def test_moments_by_segment() -> None:
    found, rows, ranks, weights = histograms()
    center = (weights @ rows.double()) / weights.sum()
    torch.testing.assert_close(found.center, center)
    for s, (low, high) in enumerate(pairwise(BOUNDS)):
        chosen = (ranks >= low) & (ranks < high)
        off = rows[chosen].double() - center
        torch.testing.assert_close(found.weights[s], weights[chosen].sum())
        torch.testing.assert_close(found.sums[s], weights[chosen] @ off)
        torch.testing.assert_close(found.squares[s], weights[chosen] @ off.square().sum(1))


def test_rows_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ranks, weights = heavy_tailed()
    whole = read_histograms("t", lambda a, b: rows[a:b], 6, BOUNDS, ranks, weights)
    monkeypatch.setattr("torchrec_mpe.precision.row_histograms._CHUNK_ELEMENTS", 600)
    asked: list[tuple[int, int]] = []

    def source(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return rows[start:stop]

    pieces = read_histograms("t", source, 6, BOUNDS, ranks, weights)
    assert asked == [(k, k + 100) for k in range(0, 3000, 100)] * 2
    torch.testing.assert_close(pieces.cumulative_values, whole.cumulative_values)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.full((4, 2), float("nan")), "table t: rows 0 to 3 hold NaN or infinite values"),
        (torch.full((4, 2), float("inf")), "table t: rows 0 to 3 hold NaN or infinite values"),
        (torch.zeros(4, 3), r"table t: rows\(0, 4\) must return float32 \[4, 2\], got torch.float32 \[4, 3\]"),
        (torch.zeros(4, 2).double(), "got torch.float64"),
    ],
)
def test_bad_rows_are_refused(rows: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_histograms("t", lambda a, b: rows, 2, (0, 4), None, torch.ones(4).double())
