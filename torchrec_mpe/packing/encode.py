"""Codes of rows, and rows of codes: what every backend computes, bit by bit."""

import torch
from torch import Tensor

from torchrec_mpe.packing.order_segments import rows_from_segments
from torchrec_mpe.packing.table_coding import PlainRows, RowCoding, TableCoding

_ROWS_AT_ONCE = 4096  # whose sums stay in the processor's cache


def encode(
    rows: Tensor, group: RowCoding, coding: TableCoding, *, table: str = "", ids: Tensor | None = None
) -> Tensor:
    """The nearest level of every element or component of some rows.

    All in float32 unless said otherwise, so that a row's codes depend on nothing but the row::

        x = row - mean
        plain:        code[d] = clamp(round(x[d] / step_size) + 2**(bits - 1), 0, 2**bits - 1)
        transformed:  c[k]    = sum over d = 0, 1, ... of x[d] * encoder[d, k], in float64, rounded once
                      code[k] = clamp(round((c[k] - offset[k]) / scale[k]), 0, 2**bits[k] - 1)

    ``round`` takes the even one of two whole numbers that are equally near. Products of float32 are exact in float64:
    a fused multiplication and addition gives the same sums. What is beyond float32 reads the outermost level.

    Args:
        rows (Tensor): float32 [n, D].
        group (RowCoding): of these rows.
        coding (TableCoding): of their table.
        table (str): its name, for errors.
        ids (Optional[Tensor]): int64 [n], ids of the rows, for errors; None: 0 to n - 1.

    Returns:
        Tensor: uint8, [n, D] of plain rows, [n, K] of transformed ones; 0 where there are no bits.

    Raises:
        ValueError: naming table and row, if a row holds NaN or infinite values.
    """
    finite = rows.isfinite().all(1)
    if not bool(finite.all()):
        bad = int(torch.nonzero(~finite)[0])
        row = bad if ids is None else int(ids[bad])
        raise ValueError(f"table {table}: row {row} holds NaN or infinite values")
    out = torch.zeros(
        len(rows), rows.shape[1] if isinstance(group, PlainRows) else coding.components, dtype=torch.uint8
    )
    for part, codes in zip(rows.split(_ROWS_AT_ONCE), out.split(_ROWS_AT_ONCE), strict=True):
        shifted = part - coding.mean
        if isinstance(group, PlainRows):
            if group.bits:
                half = 2.0 ** (group.bits - 1)
                codes.copy_((shifted / group.step_size).round_().clamp_(-half, half - 1).add_(half))
            continue
        coded = [(k, bits) for k, bits in enumerate(group.component_bits) if bits]
        components = _components(shifted, coding.encoder[:, [k for k, _ in coded]])
        for i, (k, bits) in enumerate(coded):
            levels = (components[i] - group.offsets[i]) / group.scales[i]
            codes[:, k] = levels.round_().clamp_(0, 2**bits - 1)
    return out


def _components(rows: Tensor, encoder: Tensor) -> Tensor:
    """float32 [K, n] of rows [n, D]; each sum in the order of D, whatever n."""
    sums = torch.zeros(encoder.shape[1], len(rows), dtype=torch.float64)
    for values, weights in zip(rows.T.double().contiguous(), encoder.double(), strict=True):
        sums.addcmul_(weights.unsqueeze(1), values)
    return sums.float()


def decode(codes: Tensor, group: RowCoding, coding: TableCoding, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows that codes stand for, as :class:`PlainRows` and :class:`TransformedRows` define them.

    Args:
        codes (Tensor): uint8 [n, D] or [n, K].
        group (RowCoding): of these rows.
        coding (TableCoding): of their table.
        dtype (torch.dtype): of the arithmetic and the result, float32 or float64.

    Returns:
        Tensor: [n, D].
    """
    mean = coding.basis[-1].to(dtype)
    if isinstance(group, PlainRows):
        if group.bits:
            rows = (codes.to(dtype) - 2.0 ** (group.bits - 1)) * group.step_size
            return rows.add_(mean)
        zero_row = torch.zeros(coding.embedding_dim) if coding.zero_row is None else coding.zero_row
        return zero_row.to(dtype).repeat(len(codes), 1)
    rows = torch.zeros(len(codes), coding.embedding_dim, dtype=dtype)
    coded = [k for k, bits in enumerate(group.component_bits) if bits]
    for k, scale, offset in zip(coded, group.scales, group.offsets, strict=True):
        level = codes[:, k : k + 1].to(dtype) * scale + offset
        rows += level * coding.basis[k].to(dtype)
    return rows + mean


def coded_rows(rows: Tensor, coding: TableCoding, first: int = 0, *, table: str = "") -> Tensor:
    """What is read in the place of rows once they are coded.

    Args:
        rows (Tensor): float32 [n, D], of ids that follow each other.
        coding (TableCoding): of their table.
        first (int): id of the first.
        table (str): its name, for errors.

    Returns:
        Tensor: float32 [n, D].
    """
    of_group = rows_from_segments(
        coding.bounds, range(len(coding.groups)), coding.order, torch.int32, first, first + len(rows)
    )
    out = torch.empty_like(rows)
    for number in torch.unique(of_group).tolist():
        index = torch.nonzero(of_group == number).flatten()
        group = coding.groups[number]
        codes = encode(rows[index], group, coding, table=table, ids=index + first)
        out[index] = decode(codes, group, coding)
    return out
