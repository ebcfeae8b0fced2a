"""The LSQ+ fake-quantization ops of search and retraining."""

from collections.abc import Sequence

from torch import Tensor

import torchrec_mpe.ops.reference.expected_quantization
import torchrec_mpe.ops.reference.fixed_quantization  # noqa: F401  (both imports register the reference)
from torchrec_mpe.ops.backends import implementation


def expected_quantization(
    rows: Tensor,
    probabilities: Tensor,
    group: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Expectation of the quantized rows over their groups' bit-width probabilities.

    ``out[n] = sum_k p[group[n], k] * Q_k(rows[n])`` with ``Q_k(x) = clamp(round((x - beta) / alpha[k]), -2**(b-1),
    2**(b-1) - 1) * alpha[k] + beta`` for ``b = candidate_bits[k] > 0``, and ``Q_k(x) = zero_rows[table[n]]`` (or zero)
    for ``b = 0``. Source: MPE (arXiv 2409.20305), equations of section 3.3; LSQ+ (arXiv 2004.09576).

    Gradients are the straight-through estimator's: rounding has gradient 1; outside the code range a row gets none
    and beta gets it all; alpha gets ``round(v) - v`` inside and the bound outside. The gradients of ``alpha[k]``, and
    what candidate k adds to beta's, are multiplied by ``gradient_scale[k]``.

    Args:
        rows (Tensor): [N, D], float32 or float64.
        probabilities (Tensor): [G, m], a row per feature group.
        group (Tensor): integer [N], the feature group of each row.
        alpha (Tensor): [m] positive step sizes; the entry of bit-width 0 is not read.
        beta (Tensor): [D] offset.
        zero_rows (Optional[Tensor]): [T, D], what a 0-bit row of each table reads; None reads zero.
        table (Optional[Tensor]): integer [N], each row's line of ``zero_rows``; needed with ``zero_rows``.
        candidate_bits (Sequence[int]): m bit-widths, each 0 to 8.
        gradient_scale (Tensor): [m].
        backend (Optional[str]): see :mod:`torchrec_mpe.ops.backends`.

    Returns:
        Tensor: [N, D], dtype of ``rows``.
    """
    run = implementation("expected_quantization", backend)
    result: Tensor = run(
        rows, probabilities, group.long(), alpha, beta, zero_rows, table, tuple(candidate_bits), gradient_scale
    )
    return result


def fixed_quantization(
    rows: Tensor,
    candidate: Tensor,
    alpha: Tensor,
    beta: Tensor,
    zero_rows: Tensor | None,
    table: Tensor | None,
    candidate_bits: Sequence[int],
    gradient_scale: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Every row quantized at its own bit-width: :func:`expected_quantization` with one-hot probabilities.

    Args:
        rows (Tensor): [N, D], float32 or float64.
        candidate (Tensor): integer [N], the index into ``candidate_bits`` of each row's bit-width.
        alpha, beta, zero_rows, table, candidate_bits, gradient_scale, backend: as in :func:`expected_quantization`.

    Returns:
        Tensor: [N, D], dtype of ``rows``.
    """
    run = implementation("fixed_quantization", backend)
    result: Tensor = run(rows, candidate.long(), alpha, beta, zero_rows, table, tuple(candidate_bits), gradient_scale)
    return result
