"""Packed tables in FBGEMM's inference TBE."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from torch import Tensor, nn

from torchrec_mpe.inference.fbgemm_rows import (
    SPARSE_TYPES,
    ZERO_BITS,
    FbgemmRows,
    fbgemm_rows,
    realigned,
    sub_table_offsets,
)
from torchrec_mpe.ops.bags import MEAN
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.check_bags import check_bags, check_call, check_offsets
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.upstream.modules import ConvertsItself, buffers_of
from torchrec_mpe.upstream.tensors import assert_on_device

_OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CUDA_ROW_ALIGNMENT = 16  # the CUDA kernels load 16 bytes at a time


class FbgemmTableBatchedEmbeddingBags(ConvertsItself):
    """The lookup of packed tables with FBGEMM's and PyTorch's ops alone.

    Rows of 1 and 2 bits are stored as INT2, of 3 and 4 as INT4, of 5 to 8 as INT8, each with a float16 scale and bias:
    larger than packed rows, but any host with FBGEMM runs them. All lie in the layout of one
    ``IntNBitTableBatchedEmbeddingBagsCodegen`` (TBE), a TBE table per table and format, and are looked up by the op
    that it calls; the op is called directly, because the TBE keeps its weights out of buffers, and torch.export
    refuses a registered TBE. Rows of 0 bits are not stored: like an id of -1, they are pruned.

    With ``m`` formats in use, the op sees ``m * F`` features, feature ``f`` once per format with the ids of other
    formats set to -1, and the m results are added. Then::

        out = TBE + beta * (sum of w over rows of b > 0 bits) + zero_row * (sum of w over 0-bit rows)

    and MEAN divides by the number of ids of the bag, pruned ids included.

    Equal to the reference but for the rounding of the step sizes to float16: an element is off by at most
    ``2**-11 * sum_i |w_i| * |q_i| * alpha_i``, ``q`` the signed code, for step sizes of 2**-14 and more, and by float32
    rounding. FBGEMM's CUDA kernels also compute each row in float16, which may double that.

    Rows of coded tables are decoded and quantized as FBGEMM quantizes, to INT8 unless asked otherwise: off by at most
    half the row's scale, a 255th of its range, beside the float16 rounding of scale and bias, and of D + 4 bytes a row
    whatever they took before. A table that was coded to a hundredth of fp32 is so a quarter of it.

    All state is in buffers: ``.to(device)`` moves it, ``.half()`` and friends leave it as it is, and a state_dict loads
    into a module of the same widths and row alignment. torch.export (``strict=False``), torch.jit.script, and fx with
    this class as a leaf work. An exported program in mode FATAL asserts: a RuntimeError that names no feature on CPU, a
    device-side assertion on CUDA, like FBGEMM's own.

    Args:
        packed (PackedTables): T tables.
        feature_table_map (Sequence[int]): F tables, at least one.
        pooling_mode (Sequence[int]): F of FBGEMM's PoolingMode values, 0 SUM or 1 MEAN.
        output_dtype (torch.dtype): float32, float16 or bfloat16; computed in float32.
        bounds_check_mode (int): a :class:`BoundsCheckMode`. FATAL also checks that offsets are in order; WARNING and
            IGNORE, which never synchronize, move offsets that are not.
        feature_labels (Optional[Sequence[str]]): what errors call each feature; default "table NAME, feature f".
        row_alignment (Optional[int]): bytes to whose multiple rows are padded; None: FBGEMM's own, 1 on CPU and 16 on
            CUDA. Moving to CUDA pads rows to 16.
        coded_rows (SparseType): the format of rows of coded tables, INT8, INT4 or INT2.
        device (Optional[torch.device]): where the buffers go; None: that of ``packed``.

    Attributes:
        D_offsets (list[int]): F + 1 columns, where each feature's output starts; the last is total_D.

    Raises:
        TypeError: if the output dtype is not supported.
        ValueError: if features do not fit the tables, or naming the table, if a step size in use is no float16.

    Example::

        >>> packed = pack_tables([TableToPack("t1", widths, lambda start, stop: weight[start:stop], alpha, beta)])
        >>> tbe = FbgemmTableBatchedEmbeddingBags(packed, feature_table_map=[0], pooling_mode=[0])
        >>> tbe(indices=torch.tensor([3, 7, 7]), offsets=torch.tensor([0, 2, 3])).shape
        torch.Size([2, 16])
    """

    __jit_unused_properties__ = ("nbytes",)
    _ZERO_BITS: Final[int] = ZERO_BITS  # TorchScript sees no globals

    weights: Tensor
    weights_offsets: Tensor
    weights_placements: Tensor
    weights_tys: Tensor
    column_offsets: Tensor
    row_map: Tensor
    sub_tables: Tensor
    formats: Tensor
    formats_before: Tensor
    feature_map_offsets: Tensor
    feature_formats: Tensor
    feature_rows: Tensor
    feature_numbers: Tensor
    column_features: Tensor
    stored_columns: Tensor
    beta: Tensor
    zero_rows: Tensor
    row_kinds: Tensor
    mean_features: Tensor
    bounds_check_warning: Tensor

    def __init__(
        self,
        packed: PackedTables,
        feature_table_map: Sequence[int],
        pooling_mode: Sequence[int],
        *,
        output_dtype: torch.dtype = torch.float32,
        bounds_check_mode: int = BoundsCheckMode.FATAL,
        feature_labels: Sequence[str] | None = None,
        row_alignment: int | None = None,
        coded_rows: SparseType = SparseType.INT8,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        _check_features(packed, feature_table_map, pooling_mode, output_dtype, feature_labels)
        device = packed.weights.device if device is None else torch.device(device)
        packed = packed.cpu()
        self._tables = packed.tables
        self._feature_table_map = list(feature_table_map)
        self._features = len(self._feature_table_map)
        self._labels = (
            list(feature_labels)
            if feature_labels is not None
            else [f"table {packed.tables[t].name}, feature {f}" for f, t in enumerate(feature_table_map)]
        )
        self._output_dtype = output_dtype
        mode = BoundsCheckMode(bounds_check_mode)
        self._checks_ids = mode != BoundsCheckMode.NONE
        self._fatal = mode == BoundsCheckMode.FATAL
        self._counts_bad_ids = mode == BoundsCheckMode.WARNING
        self._mean = MEAN in pooling_mode
        self._row_alignment = 1 if row_alignment is None else row_alignment
        if row_alignment is None and device.type == "cuda":
            self._row_alignment = _CUDA_ROW_ALIGNMENT

        rows = fbgemm_rows(packed, self._row_alignment, coded_rows)
        self._sub_tables = rows.sub_tables
        self._register_rows(rows)
        self._register_corrections(packed, pooling_mode)
        self.register_buffer("bounds_check_warning", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_load_state_dict_post_hook(_check_loaded)  # type: ignore[no-untyped-call]
        if device.type != "cpu":
            self.to(device)

    def _register_rows(self, rows: FbgemmRows) -> None:
        """The buffers of the TBE and of the way from ids to its rows."""
        tables = self._feature_table_map
        self._count = len(rows.formats)
        self.register_buffer("weights", rows.weights)
        self.register_buffer("row_map", rows.row_map)
        self.register_buffer("sub_tables", torch.tensor(self._sub_table_shapes(), dtype=torch.int64))
        # A format that a table lacks is looked up in another of its sub-tables, with pruned ids only.
        index = {(s.table, s.format): k for k, s in reversed(list(enumerate(rows.sub_tables)))}
        any_format = {s.table: k for k, s in reversed(list(enumerate(rows.sub_tables)))}
        self._tbe_features = [index.get((t, f), any_format[t]) for f in rows.formats for t in tables]
        chosen = [rows.sub_tables[k] for k in self._tbe_features]
        self._max_columns = [max((s.columns for s in chosen if s.format == f), default=0) for f in range(ZERO_BITS)]
        columns = [0, *accumulate(s.columns for s in chosen)]
        self._total_columns = columns[-1]
        self._register_constant("column_offsets", columns, torch.int32)
        self._register_constant("weights_tys", [SPARSE_TYPES[s.format].as_int() for s in chosen], torch.uint8)
        self._register_constant("weights_offsets", self._offsets_of_features(), torch.int64)
        self._register_constant("weights_placements", [EmbeddingLocation.HOST.value] * len(chosen), torch.int32)

        mapped = [rows.row_map_offsets[t] >= 0 for t in tables]
        self._all_mapped, self._any_mapped = all(mapped), any(mapped)
        # Far enough below 0 that no id leads into another table's part.
        starts = [rows.row_map_offsets[t] if m else -(2**31) for t, m in zip(tables, mapped, strict=True)]
        self._register_constant("feature_map_offsets", starts, torch.int64)
        self._register_constant("feature_formats", [rows.sub_tables[any_format[t]].format for t in tables], torch.int32)
        self._register_constant("formats", rows.formats, torch.int32)
        self._register_constant("formats_before", range(len(rows.formats)), torch.int32)
        self._register_constant("feature_rows", [self._tables[t].num_embeddings for t in tables], torch.int64)
        self._register_constant("feature_numbers", list(range(len(tables))), torch.int64)

    def _register_corrections(self, packed: PackedTables, pooling_mode: Sequence[int]) -> None:
        """The buffers of what is added to the TBE's result, by output column."""
        betas: list[Tensor] = []
        zero_rows: list[Tensor] = []
        stored: list[int] = []
        dims: list[int] = []
        start = 0
        for t in self._feature_table_map:
            dim = self._tables[t].embedding_dim
            scales, zero = int(packed.scale_index[t]), int(packed.zero_row_offsets[t])
            if scales < 0:  # a coded table, whose decoded rows have their means in them
                betas.append(torch.zeros(dim))
            else:
                beta = int(packed.beta_offsets[scales])
                betas.append(packed.beta[beta : beta + dim])
            zero_rows.append(packed.zero_rows[zero : zero + dim] if zero >= 0 else torch.zeros(dim))
            stored.extend(range(start, start + dim))
            start += -(-dim // 4) * 4
            dims.append(dim)
        self.D_offsets = [0, *accumulate(dims)]
        self.register_buffer("beta", torch.cat(betas))
        self._padded = start != len(stored)
        self._has_zero_rows = any(int(packed.zero_row_offsets[t]) >= 0 for t in self._feature_table_map)
        self.register_buffer("zero_rows", torch.cat(zero_rows) if self._has_zero_rows else torch.empty(0))
        self._register_constant("stored_columns", stored if self._padded else [], torch.int64)
        features = torch.repeat_interleave(self.feature_numbers, torch.tensor(dims))
        self.register_buffer("column_features", features, persistent=False)
        self._register_constant("mean_features", [mode == MEAN for mode in pooling_mode], torch.bool)
        # What one row adds to its bag's two sums: nothing if pruned, beta, or the zero row.
        kinds = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
        self.register_buffer("row_kinds", torch.tensor(kinds), persistent=False)

    def _register_constant(self, name: str, values: Sequence[int], dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=dtype), persistent=False)

    def _sub_table_shapes(self) -> list[list[int]]:
        """Table, format, rows and row bytes of each sub-table."""
        return [[s.table, s.format, s.rows, s.row_bytes(self._row_alignment)] for s in self._sub_tables]

    def _offsets_of_features(self) -> list[int]:
        """The byte where the sub-table of each of the TBE's features starts."""
        offsets, _ = sub_table_offsets(self._sub_tables, self._row_alignment)
        return [offsets[k] for k in self._tbe_features]

    def forward(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look up and pool.

        Args:
            indices (Tensor): int32 or int64 [N], row ids, feature by feature, bag by bag; -1 adds nothing.
            offsets (Tensor): int32 or int64 [F * B + 1], where each bag starts in ``indices``.
            per_sample_weights (Optional[Tensor]): floating point [N].

        Returns:
            Tensor: [B, total_D], ``output_dtype``.

        Raises:
            IndexError: in mode FATAL, naming table and feature, if an id is not a row of its table.
            TypeError: if ids, offsets or weights have a dtype that is not supported.
            ValueError: if shapes do not fit, MEAN is weighted, or in mode FATAL, offsets decrease or do not span the
                ids.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            check_bags(indices, offsets, self._features, per_sample_weights)
            if not torch.compiler.is_compiling() and indices.numel() * self._count >= 2**31:
                raise ValueError(
                    f"{indices.numel()} ids in {self._count} formats are more than int32 offsets can count"
                )
        if self._mean and per_sample_weights is not None:
            raise ValueError("MEAN pooling takes no per-sample weights: its divisor would be ambiguous")
        if self._checks_ids:
            offsets = self._checked_offsets(offsets, indices.numel())
        offsets = offsets.to(torch.int32)
        batch = (offsets.numel() - 1) // self._features
        lengths = offsets.diff().view(self._features, batch)
        feature = torch.repeat_interleave(self.feature_numbers, lengths.sum(1), output_size=indices.numel())
        if self._checks_ids:
            indices = self._checked_ids(indices, feature)
        weights = None if per_sample_weights is None else per_sample_weights.detach().to(torch.float32)

        entries = self._entries(indices, feature)
        pooled = self._pool(entries, offsets, weights)
        # 0: pruned, 1: stored, 2: 0 bits. Without weights the sums are exact, as integers in float32.
        kinds = (entries >= 0).to(torch.int32) + (entries == self._ZERO_BITS)
        sums = nn.functional.embedding_bag(
            kinds, self.row_kinds, offsets, mode="sum", include_last_offset=True, per_sample_weights=weights
        )
        of_columns = sums.view(self._features, batch, 2).permute(2, 1, 0).index_select(2, self.column_features)
        pooled = torch.addcmul(pooled, of_columns[0], self.beta)
        if self._has_zero_rows:
            pooled = torch.addcmul(pooled, of_columns[1], self.zero_rows)
        if self._mean:
            divisor = torch.where(self.mean_features.unsqueeze(1), lengths.clamp(min=1), 1).to(pooled.dtype)
            pooled = pooled / divisor.t().index_select(1, self.column_features)
        return pooled.to(self._output_dtype)

    def _checked_offsets(self, offsets: Tensor, ids: int) -> Tensor:
        """Offsets that increase from 0 to the number of ids: as given, else moved, or in mode FATAL an error."""
        if self._fatal and not self._is_exporting():
            check_offsets(offsets, ids)
            return offsets
        bag = torch.arange(offsets.numel(), device=offsets.device)
        moved = torch.where(bag == 0, 0, offsets.clamp(0, ids).cummax(0)[0])
        moved = torch.where(bag == offsets.numel() - 1, torch.full_like(moved, ids), moved)
        if self._fatal:
            assert_on_device((moved == offsets).all(), "offsets must go from 0 to the number of ids in order")
        return moved

    def _is_exporting(self) -> bool:
        """Whether torch.export traces, which cannot read ids on the host: then mode FATAL asserts on the device."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return False
        return torch.compiler.is_exporting()

    def _checked_ids(self, indices: Tensor, feature: Tensor) -> Tensor:
        """Ids of -1 or of rows: as given, else row 0, or in mode FATAL an error."""
        rows = self.feature_rows.index_select(0, feature)
        bad = (indices < -1) | (indices >= rows)
        if self._fatal and self._is_exporting():
            assert_on_device(~bad.any(), "an id is not a row of its table")
        elif self._fatal:
            if bool(bad.any()):
                first = int(bad.nonzero()[0])
                label = self._labels[int(feature[first])]
                raise IndexError(f"{label}: id {int(indices[first])} is not in [0, {int(rows[first])})")
            return indices
        if self._counts_bad_ids:
            self.bounds_check_warning.add_(bad.sum())
        return indices.masked_fill(bad, 0)

    def _entries(self, indices: Tensor, feature: Tensor) -> Tensor:
        """The row map's entry of each id, int32 [N]; -1 if pruned."""
        if self._any_mapped:
            start = self.feature_map_offsets.index_select(0, feature)
            entries = self.row_map.index_select(0, (start + indices).clamp(min=0))
            if not self._all_mapped:
                entries = torch.where(start < 0, self._own_entries(indices, feature), entries)
        else:
            entries = self._own_entries(indices, feature)
        return entries.masked_fill(indices < 0, -1)

    def _own_entries(self, indices: Tensor, feature: Tensor) -> Tensor:
        """The same for tables without a map, whose ids are the positions."""
        return (indices.to(torch.int32) << 2) + self.feature_formats.index_select(0, feature)

    def _pool(self, entries: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """The TBE's result, sums over formats: [B, total_D]."""
        count = self._count
        positions = entries >> 2  # -1 >> 2 is -1
        if count > 1 or self._any_mapped:
            positions = torch.where((entries & 3) == self.formats.unsqueeze(1), positions, -1).view(-1)
        if count > 1:
            shifts = self.formats_before.unsqueeze(1) * entries.numel()
            offsets = torch.cat([(offsets[:-1] + shifts).view(-1), offsets[-1:] * count])
            if weights is not None:
                weights = weights.repeat(count)
        pooled: Tensor = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            dev_weights=self.weights,
            uvm_weights=self.weights[:0],
            weights_placements=self.weights_placements,
            weights_offsets=self.weights_offsets,
            weights_tys=self.weights_tys,
            D_offsets=self.column_offsets,
            total_D=self._total_columns,
            max_int2_D=self._max_columns[0],
            max_int4_D=self._max_columns[1],
            max_int8_D=self._max_columns[2],
            max_float16_D=0,
            max_float32_D=0,
            indices=positions,
            offsets=offsets,
            pooling_mode=0,
            indice_weights=weights,
            output_dtype=0,
            lxu_cache_weights=self.weights.new_empty((0, 0)),
            lxu_cache_locations=self.weights_placements[:0],
            row_alignment=self._row_alignment,
        )
        if count > 1:
            pooled = pooled.view(-1, count, self._total_columns // count).sum(1)
        return pooled.index_select(1, self.stored_columns) if self._padded else pooled

    @torch.jit.unused
    def check_rows(self) -> None:
        """Check that buffers that were loaded or written to fit each other.

        Raises:
            ValueError: if rows are laid out for other tables or another row alignment, or naming the table, if its part
                of the row map leads outside its rows.
        """
        if self.sub_tables.tolist() != self._sub_table_shapes():
            raise ValueError(
                "the rows are those of other tables, other bit-widths or another row alignment: tables, formats, rows "
                f"and row bytes are {self.sub_tables.tolist()}, not {self._sub_table_shapes()}"
            )
        starts = dict(zip(self._feature_table_map, self.feature_map_offsets.tolist(), strict=True))
        for t, start in starts.items():
            if start < 0:
                continue
            entries = self.row_map[start : start + self._tables[t].num_embeddings]
            rows = torch.zeros(ZERO_BITS + 1, dtype=torch.int32, device=entries.device)
            rows[ZERO_BITS] = 1
            for s in self._sub_tables:
                if s.table == t:
                    rows[s.format] = s.rows
            if bool(((entries < 0) | (entries >> 2 >= rows[(entries & 3).long()])).any()):
                raise ValueError(f"table {self._tables[t].name}: the row map leads outside the table's rows")

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: rows with their padding, row map, corrections and constants."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def convert(self, convert: Callable[[Tensor], Tensor], recurse: bool) -> None:
        device = convert(self.row_map[:0]).device
        if device.type == "cuda" and self._row_alignment % _CUDA_ROW_ALIGNMENT:
            self.weights = realigned(self.weights, self._sub_tables, self._row_alignment, _CUDA_ROW_ALIGNMENT)
            self._row_alignment = _CUDA_ROW_ALIGNMENT
            self._register_constant("weights_offsets", self._offsets_of_features(), torch.int64)
            self.sub_tables = torch.tensor(self._sub_table_shapes(), dtype=torch.int64)
        for name, buffer in self.named_buffers():
            # Floating-point buffers travel as integers, so that half() and friends see nothing to convert.
            bits = buffer.view(torch.int32) if buffer.is_floating_point() else buffer
            result = convert(bits)
            if result.dtype != bits.dtype:
                raise TypeError(f"buffer {name} of packed rows cannot become {result.dtype}")
            buffers_of(self)[name] = result.view(buffer.dtype)
        if device.type != "meta":
            location = EmbeddingLocation.DEVICE if device.type == "cuda" else EmbeddingLocation.HOST
            self.weights_placements.fill_(location.value)

    def extra_repr(self) -> str:
        names = ", ".join(table.name for table in self._tables)
        return f"tables=[{names}], features={self._features}, {self.nbytes} bytes"


def _check_features(
    packed: PackedTables,
    feature_table_map: Sequence[int],
    pooling_mode: Sequence[int],
    output_dtype: torch.dtype,
    labels: Sequence[str] | None,
) -> None:
    features = len(feature_table_map)
    if features == 0:
        raise ValueError("FBGEMM's TBE needs at least one feature")
    check_call([0] * (features + 1), feature_table_map, pooling_mode, None, output_dtype, len(packed.tables))
    if output_dtype not in _OUTPUT_DTYPES:
        raise TypeError(f"output_dtype must be one of {_OUTPUT_DTYPES}, got {output_dtype}")
    if labels is not None and len(labels) != features:
        raise ValueError(f"{features} features need {features} labels, got {len(labels)}")


def _check_loaded(module: FbgemmTableBatchedEmbeddingBags, _incompatible_keys: object) -> None:
    """After load_state_dict: refuse rows that lie elsewhere, and a map with which a lookup could leave them."""
    if module.weights.device.type != "meta":
        module.check_rows()
