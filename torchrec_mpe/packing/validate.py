"""Checks that packed tables from a file cannot send a lookup outside their buffers."""

import torch
from torch import Tensor

from torchrec_mpe.bit_widths import MAX_BITS
from torchrec_mpe.packing.bitpack import row_bytes
from torchrec_mpe.packing.layout import ALIGNMENT, END_PADDING, TableLayout
from torchrec_mpe.packing.packed_tables import PackedTables

_CHUNK = 1 << 22


def validate_packed_tables(packed: PackedTables) -> None:
    """Check every tensor, offset and run record against the format; work is per run, and per row of a remap.

    Raises:
        ValueError: one sentence naming the table or tensor.
    """
    _check_tensors(packed)
    _check_run_offsets(packed)
    end = 0
    following = 0
    remap_offsets = packed.remap_offsets.tolist()
    for t, layout in enumerate(packed.layouts()):
        end = _check_runs(layout, packed.payload.numel(), end)
        _check_scales(packed, t, layout)
        if remap_offsets[t] == -1:
            continue
        if remap_offsets[t] != following or following + layout.num_embeddings > packed.remap.numel():
            raise ValueError(f"table {layout.name}: remap offset {remap_offsets[t]} is wrong, {following} follows")
        _check_permutation(packed.remap[following : following + layout.num_embeddings], layout.name)
        following += layout.num_embeddings
    if following != packed.remap.numel():
        raise ValueError(f"remap holds {packed.remap.numel()} rows where the tables have {following}")


def _check_tensors(packed: PackedTables) -> None:
    tables, runs, sets = len(packed.tables), packed.run_starts.numel(), packed.beta_offsets.numel()
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "payload": (torch.uint8, (packed.payload.numel(),)),
        "run_records": (torch.int64, (runs, 2)),
        "run_starts": (torch.int32, (runs,)),
        "run_offsets": (torch.int32, (tables + 1,)),
        "rows_per_table": (torch.int32, (tables,)),
        "remap": (torch.int32, (packed.remap.numel(),)),
        "remap_offsets": (torch.int64, (tables,)),
        "alpha": (torch.float32, (sets, MAX_BITS + 1)),
        "beta": (torch.float32, (packed.beta.numel(),)),
        "beta_offsets": (torch.int32, (sets,)),
        "scale_index": (torch.int32, (tables,)),
        "zero_rows": (torch.float32, (packed.zero_rows.numel(),)),
        "zero_row_offsets": (torch.int32, (tables,)),
    }
    for name, tensor in packed.tensors().items():
        dtype, shape = expected[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite")
    if packed.payload.numel() < END_PADDING:
        raise ValueError(f"payload must end with {END_PADDING} bytes of padding, it has {packed.payload.numel()} bytes")


def _check_run_offsets(packed: PackedTables) -> None:
    offsets = packed.run_offsets.tolist()
    if offsets[0] != 0 or offsets[-1] != packed.run_starts.numel():
        raise ValueError(f"run_offsets must go from 0 to {packed.run_starts.numel()}")
    rows = packed.rows_per_table.tolist()
    for t, table in enumerate(packed.tables):
        if rows[t] != table.num_embeddings:
            raise ValueError(f"table {table.name}: rows_per_table says {rows[t]} rows, not {table.num_embeddings}")
        # Bounded on both sides before any slice is taken: a dip must not hide between two legal ends.
        if not 0 <= offsets[t] < offsets[t + 1] <= offsets[-1]:
            raise ValueError(f"table {table.name}: run_offsets must increase, got {offsets[t]} and {offsets[t + 1]}")


def _check_runs(layout: TableLayout, payload_bytes: int, end: int) -> int:
    """Check the runs of a table whose payload may start at byte ``end``; returns the byte where it ends."""
    name = layout.name
    if layout.runs[0].first != 0:
        raise ValueError(f"table {name}: the first run must start at rank 0, not {layout.runs[0].first}")
    for run in layout.runs:
        if run.rows < 1:
            raise ValueError(f"table {name}: run starts must increase and stay below {layout.num_embeddings}")
        if not 0 <= run.bits <= MAX_BITS:
            raise ValueError(f"table {name}: a run of {run.bits} bits, bit-widths lie between 0 and {MAX_BITS}")
        size = row_bytes(layout.embedding_dim, run.bits)
        if run.row_bytes != size:
            raise ValueError(
                f"table {name}: rows of {layout.embedding_dim} elements at {run.bits} bits take {size} bytes, "
                f"the run at rank {run.first} says {run.row_bytes}"
            )
        if run.bits == 0:
            if run.base != 0:
                raise ValueError(f"table {name}: the 0-bit run at rank {run.first} must have no payload")
            continue
        if run.base % ALIGNMENT or run.base < end or run.end + END_PADDING > payload_bytes:
            raise ValueError(
                f"table {name}: the run at rank {run.first} lies at bytes {run.base} to {run.end}, "
                f"which must be {ALIGNMENT}-byte aligned, after byte {end} and within {payload_bytes - END_PADDING}"
            )
        end = run.end
    return end


def _check_scales(packed: PackedTables, t: int, layout: TableLayout) -> None:
    name, dim = layout.name, layout.embedding_dim
    index = int(packed.scale_index[t])
    if not 0 <= index < packed.alpha.shape[0]:
        raise ValueError(f"table {name}: scale_index {index} is not below {packed.alpha.shape[0]}")
    offset = int(packed.beta_offsets[index])
    if not 0 <= offset <= packed.beta.numel() - dim:
        raise ValueError(f"table {name}: beta offset {offset} leaves its buffer of {packed.beta.numel()}")
    zero = int(packed.zero_row_offsets[t])
    if zero != -1 and not 0 <= zero <= packed.zero_rows.numel() - dim:
        raise ValueError(f"table {name}: zero row offset {zero} leaves its buffer of {packed.zero_rows.numel()}")
    alpha = packed.alpha[index].tolist()
    if alpha[0] != 0.0 or any(run.bits and alpha[run.bits] <= 0.0 for run in layout.runs):
        raise ValueError(f"table {name}: step sizes must be 0 for 0 bits and positive for the widths in use: {alpha}")


def _check_permutation(remap: Tensor, name: str) -> None:
    seen = torch.zeros(remap.numel(), dtype=torch.bool, device=remap.device)
    for start in range(0, remap.numel(), _CHUNK):
        chunk = remap[start : start + _CHUNK].long()
        if int(chunk.min()) < 0 or int(chunk.max()) >= remap.numel():
            raise ValueError(f"table {name}: remap must stay in [0, {remap.numel()})")
        seen[chunk] = True
    if not bool(seen.all()):
        raise ValueError(f"table {name}: remap must be a permutation of its {remap.numel()} rows")
