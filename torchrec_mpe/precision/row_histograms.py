"""What post-training quantization needs to know of a table's rows: histograms by segment of the frequency order."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_mpe.packing.bit_widths import MAX_BITS
from torchrec_mpe.packing.order_segments import rows_from_segments

RowSource = Callable[[int, int], Tensor]
"""``rows(start, stop)``: the rows of ids start to stop - 1, float32 [stop - start, D]."""

_BINS = 1 << 14
_CHUNK_ELEMENTS = 1 << 20
_LARGEST = 1e17
_FINEST = 1e-8  # of the largest value: values below are told apart no more
_SMALLEST_RMS = 8  # parts of the smallest segment's root mean square that bins still tell apart


@dataclass(frozen=True)
class RowHistograms:
    """Elements of a table's rows, weighted by the rows' lookups, by segment s of the frequency order.

    Elements are counted from ``center`` and put into bins that are narrow near 0 and wide far out (the inverse
    hyperbolic sine is cut evenly), because the spread of trained rows differs by orders of magnitude.

    Attributes:
        bounds (tuple[int, ...]): S + 1 increasing places, from 0 to num_embeddings.
        center (Tensor): float64 [D], the weighted mean row.
        weights (Tensor): float64 [S], sums of the rows' weights.
        sums (Tensor): float64 [S, D], weighted sums of ``row - center``.
        squares (Tensor): float64 [S], weighted sums of ``|row - center| ** 2``.
        cumulative_weights (Tensor): float64 [S, bins + 1], weights of all elements below each edge.
        cumulative_values (Tensor): float64 [S, bins + 1], weighted sums of the elements below each edge.
        scale (float): an element v is at ``asinh(v / scale)``.
        first_edge (float): where the first bin starts, after that transformation.
        bin_width (float): of every bin, after that transformation.
    """

    bounds: tuple[int, ...]
    center: Tensor
    weights: Tensor
    sums: Tensor
    squares: Tensor
    cumulative_weights: Tensor
    cumulative_values: Tensor
    scale: float
    first_edge: float
    bin_width: float

    @property
    def root_mean_squares(self) -> Tensor:
        """Of each segment's elements, float64 [S]."""
        return (self.squares / (self.weights * len(self.center))).sqrt()

    def errors(self, bits: int, alpha: Tensor, shift: Tensor) -> Tensor:
        """Weighted squared error of quantization with levels ``center + shift + alpha * code``.

        Thresholds between levels are moved to the nearest edge of a bin; the moments inside bins are exact.

        Args:
            bits (int): 1 to 8; codes run from ``-2**(bits - 1)`` to ``2**(bits - 1) - 1``.
            alpha (Tensor): float64 [A], positive step sizes.
            shift (Tensor): float64 [H], what is added to the center.

        Returns:
            Tensor: float64 [H, S, A].
        """
        half = 2 ** (bits - 1)
        steps = torch.arange(-half, half - 1, dtype=torch.float64) + 0.5
        thresholds = shift.view(-1, 1, 1) + alpha.view(1, -1, 1) * steps  # [H, A, levels - 1]
        edges = ((thresholds / self.scale).asinh() - self.first_edge) / self.bin_width
        edges = edges.round().long().clamp(0, self.cumulative_weights.shape[1] - 1)
        last = shift.view(-1, 1) + alpha * (half - 1)  # [H, A], the highest level
        columns = edges.flatten()
        errors: list[Tensor] = []
        for weights, values, square in zip(
            self.cumulative_weights, self.cumulative_values, self.squares.tolist(), strict=True
        ):
            # Summed by parts: between neighbouring levels the square of the level grows by 2 * alpha * threshold.
            below = thresholds * weights[columns].view_as(edges) - values[columns].view_as(edges)
            errors.append(square + last.square() * weights[-1] - 2 * last * values[-1] - 2 * alpha * below.sum(2))
        return torch.stack(errors, 1).clamp_(min=0)


def read_histograms(
    name: str,
    rows: RowSource,
    embedding_dim: int,
    bounds: Sequence[int],
    order: Tensor | None,
    weights: Tensor,
    done: Callable[[int], object] = lambda rows: None,
) -> RowHistograms:
    """Read a table twice, a few MiB at a time.

    Args:
        name (str): table, for errors.
        rows (RowSource): called with increasing ids.
        embedding_dim (int): D.
        bounds (Sequence[int]): S + 1 increasing places, from 0 to num_embeddings.
        order (Optional[Tensor]): int32 [num_embeddings], None when ids are in that order.
        weights (Tensor): float64 [num_embeddings], positive, by row id.
        done (Callable[[int], object]): told the number of rows after each piece.

    Raises:
        ValueError: naming the table, if rows have another shape or dtype, or are not finite.
    """
    segments = len(bounds) - 1
    total = torch.zeros(embedding_dim, dtype=torch.float64)
    squares = torch.zeros(segments, dtype=torch.float64)
    weight = torch.zeros(segments, dtype=torch.float64)
    largest = 0.0
    for start, chunk in read_pieces(name, rows, embedding_dim, bounds[-1]):
        stop = start + len(chunk)
        chunk_weights, of_row = weights[start:stop], _segments(bounds, order, start, stop)
        values = chunk.double()
        total += chunk_weights @ values
        weight.index_add_(0, of_row, chunk_weights)
        squares.index_add_(0, of_row, chunk_weights * values.square().sum(1))
        largest = max(largest, float(chunk.abs().max()))
        done(len(chunk))
    center = total / weight.sum()
    rms = (squares / (weight * embedding_dim)).sqrt()
    largest += float(center.abs().max())
    scale = max(float(rms[rms > 0].min()) / _SMALLEST_RMS if largest else 1.0, largest * _FINEST)
    first_edge = -math.asinh(largest / scale) - 1e-9
    bin_width = -2 * first_edge / _BINS
    squares.zero_()
    sums = torch.zeros(segments, embedding_dim, dtype=torch.float64)
    flat = torch.zeros(2, segments * _BINS, dtype=torch.float64)
    for start, chunk in read_pieces(name, rows, embedding_dim, bounds[-1]):
        stop = start + len(chunk)
        chunk_weights, of_row = weights[start:stop], _segments(bounds, order, start, stop)
        values = chunk.double() - center
        weighted = values * chunk_weights.unsqueeze(1)
        sums.index_add_(0, of_row, weighted)
        squares.index_add_(0, of_row, (weighted * values).sum(1))
        bins = ((values / scale).asinh_().sub_(first_edge) / bin_width).long().clamp_(0, _BINS - 1)
        bins = bins.add_((of_row * _BINS).unsqueeze(1)).flatten()
        flat[0].index_add_(0, bins, chunk_weights.repeat_interleave(embedding_dim))
        flat[1].index_add_(0, bins, weighted.flatten())
        done(len(chunk))
    cumulative = torch.nn.functional.pad(flat.view(2, segments, _BINS).cumsum(2), (1, 0))
    return RowHistograms(
        tuple(bounds), center, weight, sums, squares, cumulative[0], cumulative[1], scale, first_edge, bin_width
    )


def read_pieces(name: str, rows: RowSource, embedding_dim: int, num_embeddings: int) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of each piece of a table, a few MiB each.

    Raises:
        ValueError: naming the table, if rows have another shape or dtype, are not finite, or so large that sums of
            their squares overflow float32.
    """
    step = max(1, _CHUNK_ELEMENTS // embedding_dim)
    for start in range(0, num_embeddings, step):
        stop = min(start + step, num_embeddings)
        chunk = rows(start, stop)
        if chunk.dtype != torch.float32 or tuple(chunk.shape) != (stop - start, embedding_dim):
            raise ValueError(
                f"table {name}: rows({start}, {stop}) must return float32 [{stop - start}, {embedding_dim}], got "
                f"{chunk.dtype} {list(chunk.shape)}"
            )
        low, high = chunk.aminmax()  # NaN if any is
        largest = float(torch.maximum(-low, high))
        if not math.isfinite(largest):
            raise ValueError(f"table {name}: rows {start} to {stop - 1} hold NaN or infinite values")
        if largest > _LARGEST:
            raise ValueError(
                f"table {name}: rows {start} to {stop - 1} hold values as large as {largest:.1e}, and above "
                f"{_LARGEST:.0e} their squares overflow: such rows are not trained ones"
            )
        yield start, chunk.cpu()


def candidate_step_sizes(histograms: RowHistograms, number: int) -> Tensor:
    """Step sizes to try, float64 [8, number], of 1 to 8 bits: evenly spaced in the logarithm.

    They reach from half of what suits the narrowest segment, were its elements normally distributed, to four times of
    what suits the widest: trained rows have heavier tails.
    """
    spread = histograms.root_mean_squares
    spread = spread[spread > 0]
    low, high = (float(spread.min()), float(spread.max())) if len(spread) else (1.0, 1.0)
    # Step sizes of the least squared error of a uniform quantizer of a normal distribution (J. Max, 1960).
    normal = (1.596, 0.996, 0.586, 0.335, 0.188, 0.104, 0.0569, 0.0308)
    assert len(normal) == MAX_BITS
    return torch.stack(
        [torch.logspace(math.log10(low * c / 2), math.log10(high * c * 4), number, dtype=torch.float64) for c in normal]
    )


def _segments(bounds: Sequence[int], order: Tensor | None, start: int, stop: int) -> Tensor:
    return rows_from_segments(bounds, range(len(bounds) - 1), order, torch.int64, start, stop)
