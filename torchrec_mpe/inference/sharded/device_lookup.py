"""The part of sharded packed tables that one device looks up."""

import re
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from torchrec_mpe.inference.sharded.row_ranges import RowRange, take_rows
from torchrec_mpe.inference.sharded.scriptable_tbe import ScriptablePackedTableBatchedEmbeddingBags
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.packing.packed_tables import PackedTables


class DeviceLookup(nn.Module):
    """Whole tables and ranges of rows on one device, pooled for the features that read them.

    A feature reads each range of its table once. Ids outside the range become -1, pruned rows that add nothing; ids
    that are no rows of the table go as they are to the range that starts at row 0, which treats them as
    ``bounds_check_mode`` says. So a bad id is met once, whatever the number of ranges.

    Args:
        packed (PackedTables): all tables of the collection.
        ranges (Sequence[RowRange]): what this device holds.
        feature_table_map (Sequence[int]): tables of the collection's F features.
        pooling_mode (Sequence[int]): F of FBGEMM's PoolingMode values. A range pools by SUM, for MEAN counts all ids of
            a bag.
        output_dtype (torch.dtype): of the pooled embeddings; float32 in place of a narrower one if there is a range, so
            that the sum over ranges is rounded once.
        bounds_check_mode (int): a BoundsCheckMode.
        feature_labels (Sequence[str]): F names for errors.
        device (torch.device): where the tables go.

    Attributes:
        columns (list[tuple[int, int, int]]): the collection's feature, first and last column of each group of output
            columns.
    """

    feature_order: Tensor
    first_row: Tensor
    num_rows: Tensor
    valid_rows: Tensor

    def __init__(
        self,
        packed: PackedTables,
        ranges: Sequence[RowRange],
        feature_table_map: Sequence[int],
        pooling_mode: Sequence[int],
        output_dtype: torch.dtype,
        bounds_check_mode: int,
        feature_labels: Sequence[str],
        device: torch.device,
    ) -> None:
        super().__init__()
        reads = [(f, k) for f, t in enumerate(feature_table_map) for k, r in enumerate(ranges) if r.table == t]
        rows = [packed.tables[r.table].num_embeddings for r in ranges]
        is_part = [r.num_rows < n for r, n in zip(ranges, rows, strict=True)]
        narrow = output_dtype in (torch.float16, torch.bfloat16)
        own = take_rows(packed, ranges)
        self.device = device
        self.has_ranges = any(is_part)
        self.reads_all = [f for f, _ in reads] == list(range(len(feature_table_map)))
        self.tbe = ScriptablePackedTableBatchedEmbeddingBags(
            own,
            [k for _, k in reads],
            [0 if is_part[k] else pooling_mode[f] for f, k in reads],
            output_dtype=torch.float32 if self.has_ranges and narrow else output_dtype,
            bounds_check_mode=bounds_check_mode,
            feature_labels=[feature_labels[f] for f, _ in reads],
            device=device,
        )
        self._rows_of_label = {feature_labels[f]: rows[k] for f, k in reads}
        ends = self.tbe.D_offsets
        self.columns = [(f, ends[c], ends[c + 1]) for c, (f, _) in enumerate(reads)]
        self._register("feature_order", [f for f, _ in reads], torch.int32)
        self._register("first_row", [ranges[k].first_row for _, k in reads])
        self._register("num_rows", [ranges[k].num_rows for _, k in reads])
        self._register("valid_rows", [rows[k] for _, k in reads])
        starts_a_table = any(ranges[k].first_row == 0 for _, k in reads)
        self.meets_bad_ids = bounds_check_mode != BoundsCheckMode.NONE and starts_a_table

    def _register(self, name: str, values: Sequence[int], dtype: torch.dtype = torch.int64) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=dtype, device=self.device), persistent=False)

    def forward(self, lengths: Tensor, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        """Look up and pool.

        Args:
            lengths (Tensor): int32 or int64 [F, B], ids of each bag of all features of the collection, on any device.
            ids (Tensor): int32 or int64 [N], row ids of the whole tables, feature by feature, bag by bag.
            weights (Optional[Tensor]): floating point [N].

        Returns:
            Tensor: [B, this device's columns], on this device; B > 0.

        Raises:
            IndexError: in mode FATAL, naming table and feature, if an id is not a row of its table.
        """
        if not self.reads_all:
            # Before the copy: a device gets only the ids of its features.
            lengths, ids, weights = torch.ops.fbgemm.permute_2D_sparse_data(
                self.feature_order.to(ids.device), lengths, ids, weights
            )
        lengths = lengths.to(self.device, non_blocking=True)
        ids = ids.to(self.device, non_blocking=True)
        if weights is not None:
            weights = weights.to(self.device, non_blocking=True)
        if self.has_ranges:
            ids = self._within_ranges(ids, lengths.sum(1))
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.reshape(-1))
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            result: Tensor = self.tbe(ids, offsets, weights)
            return result
        else:  # TorchScript leaves no more than this branch uncompiled
            return self._look_up(ids, offsets, weights)

    def _within_ranges(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Ids that count from the first row of each feature's range."""
        shift = torch.repeat_interleave(self.first_row.to(ids.dtype), counts, output_size=ids.numel())
        rows = torch.repeat_interleave(self.num_rows.to(ids.dtype), counts, output_size=ids.numel())
        local = ids - shift
        pruned = (local < 0) | (local >= rows)
        if self.meets_bad_ids:
            valid = torch.repeat_interleave(self.valid_rows.to(ids.dtype), counts, output_size=ids.numel())
            pruned = pruned & (((ids >= -1) & (ids < valid)) | (shift > 0))
        return local.masked_fill(pruned, -1)

    @torch.jit.unused
    def _look_up(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        # Triton launches on the current device, whatever the tensors'.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            try:
                result: Tensor = self.tbe(ids, offsets, weights)
            except IndexError as error:
                raise IndexError(self._of_whole_table(str(error))) from None
        return result

    @torch.jit.unused
    def _of_whole_table(self, message: str) -> str:
        """The message with the rows of the whole table in place of the range's."""
        for label, rows in self._rows_of_label.items():
            if message.startswith(f"{label}: "):
                return re.sub(r"\[0, \d+\)$", f"[0, {rows})", message)
        return message

    @property
    def nbytes(self) -> int:
        """Bytes of the tables on this device."""
        return self.tbe.nbytes

    __jit_unused_properties__ = ("nbytes",)
