"""Packed tables behind the interface of FBGEMM's inference TBE."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor

from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.check_bags import check_call
from torchrec_mpe.ops.directory import LINE_BYTES
from torchrec_mpe.ops.packed_embedding_bag import packed_embedding_bag
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.size import SizeReport, size_report
from torchrec_mpe.packing.update import TableRows, UpdatedRows, update_packed_tables_
from torchrec_mpe.packing.validate import validate_packed_tables
from torchrec_mpe.upstream.modules import ConvertsItself, buffers_of


class PackedTableBatchedEmbeddingBags(ConvertsItself):
    """T packed tables that are looked up by one call, like FBGEMM's ``IntNBitTableBatchedEmbeddingBagsCodegen`` (TBE).

    Names and conventions are the TBE's; what it has per table (a data type, a weight tensor) is here in ``packed``.
    The op is the CPU's in C++ or Triton's, by device; :mod:`torchrec_mpe.ops.backends` chooses others.

    All state is in buffers, the tensors of :class:`PackedTables`: no parameters, no gradients. ``.to(device)`` moves
    them; ``.half()``, ``.float()`` and ``.to(dtype)`` leave every buffer as it is. A state_dict loads into a module of
    the same tables and is checked.

    Args:
        packed (PackedTables): T tables.
        feature_table_map (Optional[Sequence[int]]): F tables, feature by feature; None: every table is one feature.
        pooling_mode (int | Sequence[int]): FBGEMM's PoolingMode.SUM or MEAN, for all features or one each.
        output_dtype (torch.dtype | SparseType): float32, float16 or bfloat16, computed in float32; or float64.
        bounds_check_mode (int): FBGEMM's BoundsCheckMode, see :class:`torchrec_mpe.ops.bounds_check.BoundsCheckMode`.
            FATAL by default, where FBGEMM has WARNING: an id that is no row of its table is somebody's mistake.
        feature_labels (Optional[Sequence[str]]): what errors call each feature; default "table NAME, feature f".
        device (Optional[torch.device]): where the buffers go; None: they stay.

    Attributes:
        D_offsets (list[int]): F + 1 columns, where each feature's output starts; the last is total_D.
        bounds_check_warning (Optional[Tensor]): int64 [1], in mode WARNING the number of bad ids met so far.

    Raises:
        TypeError: if the output dtype is not supported.
        ValueError: if features do not fit the tables.

    Example::

        >>> packed = pack_tables([TableToPack("t1", widths, lambda start, stop: weight[start:stop], alpha, beta)])
        >>> tbe = PackedTableBatchedEmbeddingBags(packed, pooling_mode=PoolingMode.SUM)
        >>> tbe(indices=torch.tensor([3, 7, 7]), offsets=torch.tensor([0, 2, 3])).shape
        torch.Size([2, 16])
    """

    bounds_check_warning: Tensor | None

    def __init__(
        self,
        packed: PackedTables,
        feature_table_map: Sequence[int] | None = None,
        pooling_mode: int | Sequence[int] = 0,
        *,
        output_dtype: torch.dtype | SparseType = torch.float32,
        bounds_check_mode: int = BoundsCheckMode.FATAL,
        feature_labels: Sequence[str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._tables = packed.tables
        features = list(range(len(packed.tables)) if feature_table_map is None else feature_table_map)
        modes = [int(pooling_mode)] * len(features) if isinstance(pooling_mode, int) else [int(m) for m in pooling_mode]
        dtype: torch.dtype = output_dtype.as_dtype() if isinstance(output_dtype, SparseType) else output_dtype
        check_call([0] * (len(features) + 1), features, modes, None, dtype, len(packed.tables))
        if feature_labels is not None and len(feature_labels) != len(features):
            raise ValueError(f"{len(features)} features need {len(features)} labels, got {len(feature_labels)}")
        self.feature_table_map = features
        self.pooling_mode = modes
        self.output_dtype = dtype
        self.bounds_check_mode = BoundsCheckMode(int(bounds_check_mode))
        self.feature_labels = (
            list(feature_labels)
            if feature_labels is not None
            else [f"table {packed.tables[t].name}, feature {f}" for f, t in enumerate(features)]
        )
        self.D_offsets = [0, *accumulate(packed.tables[t].embedding_dim for t in features)]
        self._buffer_names = list(packed.tensors())
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, _aligned(tensor if device is None else tensor.to(device)))
        counts = self.bounds_check_mode == BoundsCheckMode.WARNING
        counter = torch.zeros(1, dtype=torch.int64, device=self.device) if counts else None
        self.register_buffer("bounds_check_warning", counter, persistent=False)
        self.register_load_state_dict_post_hook(_check_loaded)  # type: ignore[no-untyped-call]

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Look up and pool.

        Args:
            indices (Tensor): int32 or int64 [N], row ids, feature by feature, bag by bag; -1 adds nothing.
            offsets (Tensor): int32 or int64 [F * B + 1], where each bag starts in ``indices``.
            per_sample_weights (Optional[Tensor]): floating point [N].
            out (Optional[Tensor]): [B, total_D] of ``output_dtype``, contiguous, to write the result to: a fresh output
                costs as much as a lookup of one id a bag.

        Returns:
            Tensor: [B, total_D], ``output_dtype``; ``out`` if given.

        Raises:
            IndexError: in mode FATAL, naming table and feature, if an id is not a row of its table.
            TypeError: if ids, offsets, weights or ``out`` have a dtype that is not supported.
            ValueError: if offsets decrease or do not span the ids, shapes do not fit, or MEAN is weighted.
        """
        return self.lookup(slice(0, len(self.feature_table_map)), indices, offsets, per_sample_weights, out)

    def lookup(
        self,
        features: slice,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """:meth:`forward` for neighbouring features alone, whose ids, offsets and columns start at 0."""
        first, last = features.start, features.stop
        column = self.D_offsets[first]
        buffers = buffers_of(self)
        tensors: dict[str, Any] = {name: buffers[name] for name in self._buffer_names}
        return packed_embedding_bag(
            **tensors,
            D_offsets=[offset - column for offset in self.D_offsets[first : last + 1]],
            feature_table_map=self.feature_table_map[first:last],
            pooling_mode=self.pooling_mode[first:last],
            indices=indices,
            offsets=offsets,
            per_sample_weights=per_sample_weights,
            output_dtype=self.output_dtype,
            bounds_check_mode=int(self.bounds_check_mode),
            bounds_check_warning=self.bounds_check_warning,
            out=out,
            feature_labels=self.feature_labels[first:last],
        )

    def apply_update(
        self, rows: Mapping[str, TableRows], encoders: Mapping[str, Tensor] | None = None
    ) -> dict[str, UpdatedRows]:
        """Give rows new values in place, at the bit-widths, step sizes and offsets that the tables have.

        On the CPU any number of threads may look up meanwhile: a lookup finds each row old or new, never half of each,
        but of several rows, also of one update, it may find some old and others new. It waits while about a thousand
        rows are written, and for lookups before it that those wait for, of which large ones let a writer in every
        65,536 ids. On CUDA the update is ordered with other work of the current stream alone. Moving the module or
        loading a state dict meanwhile is not safe. :func:`.packing.update.update_packed_tables_` says what becomes
        of tables on the pages of a file.

        Args:
            rows (Mapping[str, tuple[Tensor, Tensor]]): by table, ids, int32 or int64 [n], and values, float32 [n, D].
                Of an id that is given more than once the last values stay.
            encoders (Optional[Mapping[str, Tensor]]): float32 [D, K] of each coded table in ``rows``.

        Returns:
            dict[str, UpdatedRows]: of each table in ``rows``, how many rows have their new values, and how many have 0
            bits and so still read the table's vector for such rows.

        Raises:
            IndexError: naming the table, if an id is no row of it.
            KeyError: if there is no such table.
            TypeError: naming the table, if ids, values or encoder have another dtype.
            ValueError: naming the table, if a shape is wrong, values hold NaN, or a coded table has no encoder or gets
                infinite values. Whatever is raised, no row of any table has changed.

        Example::

            >>> tbe.apply_update({"t1": (torch.tensor([3, 7]), torch.randn(2, 16))})
            {'t1': UpdatedRows(written=2, zero_bits=0)}
        """
        return update_packed_tables_(self.packed_tables(), rows, encoders)

    def packed_tables(self) -> PackedTables:
        """The buffers, not copied."""
        return PackedTables(self._tables, **{name: self.get_buffer(name) for name in self._buffer_names})

    def size_report(self) -> SizeReport:
        """Bytes of the tables by kind, per table and overall."""
        return size_report(self.packed_tables())

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self.packed_tables().nbytes

    @property
    def device(self) -> torch.device:
        """The device of the buffers."""
        return self.get_buffer("weights").device

    def convert(self, convert: Callable[[Tensor], Tensor], recurse: bool) -> None:
        # Floating-point buffers travel as integers, so that half() and friends see nothing to convert.
        moved: dict[str, Tensor] = {}
        for name, buffer in self.named_buffers():
            as_integers = torch.int16 if buffer.element_size() == 2 else torch.int32
            bits = buffer.view(as_integers) if buffer.is_floating_point() else buffer
            result = convert(bits)
            if result.dtype != bits.dtype:
                raise TypeError(f"buffer {name} of packed tables cannot become {result.dtype}")
            moved[name] = result.view(buffer.dtype)
        if self.device.type == "cpu" and moved["weights"].device.type not in ("cpu", "meta"):
            # A file's tables may have been opened without a look at their directories, which Triton's kernels trust.
            validate_packed_tables(self.packed_tables())
        buffers_of(self).update(moved)

    def extra_repr(self) -> str:
        if self.device.type == "meta":
            return ",\n".join(f"{table.name}({table.num_embeddings}, {table.embedding_dim})" for table in self._tables)
        report = self.size_report()
        lines = []
        for table in report.tables:
            lines.append(
                f"{table.name}({table.num_embeddings}, {table.embedding_dim}, rows: {table.describe_rows()}, "
                f"{table.directory_kind}, {table.total} bytes, {table.compression_ratio:.1f}x)"
            )
        return "\n".join([*lines, f"all: {report.total} bytes, {report.compression_ratio:.1f}x"])


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it does not start at a cache line: a view of a file may start anywhere."""
    return tensor if tensor.device.type != "cpu" or tensor.data_ptr() % LINE_BYTES == 0 else tensor.clone()


def _check_loaded(module: PackedTableBatchedEmbeddingBags, _incompatible_keys: Any) -> None:
    """After load_state_dict: refuse tensors with which a lookup could leave its buffers."""
    if module.device.type != "meta":
        validate_packed_tables(module.packed_tables())
