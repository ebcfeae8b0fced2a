"""Packed tables spread over devices, behind the interface of one TBE."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchrec_mpe.inference.packed_table_batched_embedding_bags import PackedTableBatchedEmbeddingBags
from torchrec_mpe.inference.sharded.device_lookup import DeviceLookup
from torchrec_mpe.inference.sharded.row_ranges import RowRange
from torchrec_mpe.ops.bags import MEAN
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.check_bags import check_bags, check_offsets
from torchrec_mpe.upstream.modules import ConvertsItself


class ShardedPackedTableBatchedEmbeddingBags(ConvertsItself):
    """The lookup of packed tables whose tables, or ranges of rows, lie on several devices of one process.

    Ids go to the devices that hold their tables; a table in ranges has its ids sent to each of its devices. What the
    devices pool is gathered on the output device, ranges summed in the order of the devices and divided once for MEAN.
    On CUDA, copies do not block the host and devices work at the same time, but in mode FATAL, whose lookups wait for
    their device one after the other: serve in mode WARNING or IGNORE there.

    Equal to the unsharded module bit for bit, but for tables in ranges, whose sums have another order.

    ``.to(device)`` leaves everything where it is. torch.jit.script works; it calls operators alone, so that a process
    with ``libtorchrec_mpe.so`` and FBGEMM's libraries runs it, on the CPU, without Python. Scripted, devices are
    constants, and errors name tables by number and give the rows of the range that met the id.

    Args:
        tbe (PackedTableBatchedEmbeddingBags): the unsharded module, which stays as it is.
        ranges (Mapping[torch.device | int, Sequence[RowRange]]): index of each device in use to what it holds; together
            every row of every table once.
        devices (Sequence[torch.device]): devices by index; one may occur twice.
        output_device (torch.device): where the pooled embeddings go.

    Attributes:
        lookups (nn.ModuleList): a :class:`DeviceLookup` for each device in use.
        device_indices (list[int]): the index of each of them in ``devices``.
    """

    pieces: list[list[tuple[int, int, int]]]
    mean_features: list[int]

    def __init__(
        self,
        tbe: PackedTableBatchedEmbeddingBags,
        ranges: Mapping[int, Sequence[RowRange]],
        devices: Sequence[torch.device],
        output_device: torch.device,
    ) -> None:
        super().__init__()
        packed = tbe.packed_tables()
        self.device_indices = sorted(d for d, held in ranges.items() if held)
        self.output_device = output_device
        self.output_dtype = tbe.output_dtype
        self.features = len(tbe.feature_table_map)
        self.total_columns = tbe.D_offsets[-1]
        self.bounds_check_mode = BoundsCheckMode(int(tbe.bounds_check_mode))
        self.lookups = nn.ModuleList(
            DeviceLookup(
                packed,
                ranges[d],
                tbe.feature_table_map,
                tbe.pooling_mode,
                tbe.output_dtype,
                tbe.bounds_check_mode,
                tbe.feature_labels,
                devices[d],
            )
            for d in self.device_indices
        )
        self._place_columns(tbe)

    def _place_columns(self, tbe: PackedTableBatchedEmbeddingBags) -> None:
        """Decide which columns of which lookup make up the output, from left to right."""
        of_feature: list[list[tuple[int, int, int]]] = [[] for _ in range(self.features)]
        for k, lookup in enumerate(self._device_lookups()):
            for f, first, last in lookup.columns:
                of_feature[f].append((k, first, last))
        # Output pieces: the summed columns of lookups, and the feature by whose ids a mean divides, or -1.
        self.pieces = []
        self.mean_features = []
        for f, parts in enumerate(of_feature):
            divides = len(parts) > 1 and tbe.pooling_mode[f] == MEAN
            before = self.pieces[-1] if self.pieces and self.mean_features[-1] < 0 else []
            # Neighbours in the output that are neighbours on all of their devices are one piece.
            if not divides and [(k, last) for k, _, last in before] == [(k, first) for k, first, _ in parts]:
                self.pieces[-1] = [(k, first, part[2]) for (k, first, _), part in zip(before, parts, strict=True)]
            else:
                self.pieces.append(parts)
                self.mean_features.append(f if divides else -1)

    def forward(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look up and pool; arguments and errors as those of :meth:`PackedTableBatchedEmbeddingBags.forward`.

        Args:
            indices (Tensor): int32 or int64 [N], row ids, feature by feature, bag by bag, on any device.
            offsets (Tensor): int32 or int64 [F * B + 1], on the same device.
            per_sample_weights (Optional[Tensor]): floating point [N], on the same device.

        Returns:
            Tensor: [B, total_D], ``output_dtype``, on the output device.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            check_bags(indices, offsets, self.features, per_sample_weights)
        if self.features == 0 or offsets.numel() == 1:
            return torch.zeros((0, self.total_columns), dtype=self.output_dtype, device=self.output_device)
        lengths = self._lengths(offsets, indices.numel())
        pooled: list[Tensor] = []
        for lookup in self.lookups:
            pooled.append(lookup(lengths, indices, per_sample_weights))
        # Only now: the devices have all got their work before the first copy back.
        pooled = [each.to(self.output_device, non_blocking=True) for each in pooled]
        columns: list[Tensor] = []
        for parts, mean_feature in zip(self.pieces, self.mean_features):  # noqa: B905  (TorchScript has no strict)
            k, first, last = parts[0]
            total = pooled[k][:, first:last]
            for k, first, last in parts[1:]:
                total = total + pooled[k][:, first:last]
            if mean_feature >= 0:
                ids = lengths[mean_feature].to(self.output_device, non_blocking=True)
                total = total / ids.clamp(min=1).to(total.dtype).unsqueeze(1)
            columns.append(total.to(self.output_dtype))
        return columns[0].contiguous() if len(columns) == 1 else torch.cat(columns, dim=1)

    def _lengths(self, offsets: Tensor, ids: int) -> Tensor:
        """Ids of each bag, [F, B]."""
        fatal, checks = self.bounds_check_mode == 0, self.bounds_check_mode != 3
        if fatal or (checks and not offsets.is_cuda):
            self._check_offsets(offsets, ids)
        elif checks:
            # To check values would wait for the device.
            offsets = offsets.clamp(0, ids).cummax(0)[0]
        return offsets.diff().view(self.features, -1)

    def _check_offsets(self, offsets: Tensor, ids: int) -> None:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if int(offsets[0]) != 0 or int(offsets[-1]) != ids or bool((offsets.diff() < 0).any()):
                raise ValueError("offsets must go from 0 to the number of ids and not decrease")
        else:
            check_offsets(offsets, ids)

    def convert(self, convert: Callable[[Tensor], Tensor], recurse: bool) -> None:
        if all(convert(buffer[:0]).device == buffer.device for buffer in self.buffers()):
            super().convert(convert, recurse)

    @property
    def device_bytes(self) -> dict[int, int]:
        """Bytes of the tables on each device in use, by index."""
        return {d: lookup.nbytes for d, lookup in zip(self.device_indices, self._device_lookups(), strict=True)}

    @property
    def bad_ids(self) -> int:
        """In mode WARNING, how many ids were no rows of their tables so far."""
        counters = [lookup.tbe.bounds_check_warning for lookup in self._device_lookups()]
        return sum(int(counter) for counter in counters if counter is not None)

    @torch.jit.unused
    def _device_lookups(self) -> list[DeviceLookup]:
        return [lookup for lookup in self.lookups if isinstance(lookup, DeviceLookup)]

    __jit_unused_properties__ = ("device_bytes", "bad_ids")
