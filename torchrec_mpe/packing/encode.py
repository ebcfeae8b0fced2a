"""Rows to the codes of their group."""

import torch
from torch import Tensor

from torchrec_mpe.packing.table_coding import PlainRows, RowCoding, TableCoding


def encode(rows: Tensor, group: RowCoding, coding: TableCoding) -> Tensor:
    """The codes of rows of one group, each the nearest of its levels, of two equally near ones the even code.

    The components of a row are sums over D in float64, so that they do not depend on the rows that come with it.

    Args:
        rows (Tensor): float32 [n, D].
        group (RowCoding): of all of them, with more than 0 bits.
        coding (TableCoding): of their table.

    Returns:
        Tensor: uint8, of plain rows [n, D], of transformed ones [n, K]; 0 for components of 0 bits.
    """
    centered = rows.double() - coding.mean.to(rows.device).double()
    if isinstance(group, PlainRows):
        codes = (centered / group.step_size).round_() + (1 << (group.bits - 1))
        return codes.clamp_(0, (1 << group.bits) - 1).to(torch.uint8)
    encoder = coding.encoder.to(rows.device).double()
    codes = torch.zeros((len(rows), group.components), dtype=torch.uint8, device=rows.device)
    coded = [(k, bits) for k, bits in enumerate(group.component_bits) if bits]
    for (k, bits), scale, offset in zip(coded, group.scales, group.offsets, strict=True):
        component = (centered * encoder[:, k]).sum(1)
        codes[:, k] = ((component - offset) / scale).round_().clamp_(0, (1 << bits) - 1).to(torch.uint8)
    return codes
