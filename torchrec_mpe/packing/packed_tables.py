"""The tensors of a collection of packed tables."""

from dataclasses import dataclass, fields

from torch import Tensor

from torchrec_mpe.packing.layout import Run, TableLayout


@dataclass(frozen=True)
class TableShape:
    """A table's name and logical shape."""

    name: str
    num_embeddings: int
    embedding_dim: int


@dataclass(frozen=True)
class PackedTables:
    """T packed tables in table-batched form: what the op ``packed_embedding_bag`` reads, and every stored byte.

    An id of table t finds its row so::

        rank = remap[remap_offsets[t] + id]  if remap_offsets[t] >= 0 else id
        run  = last k in [run_offsets[t], run_offsets[t + 1]) with run_starts[k] <= rank
        {offset, row_bytes, bits} = run_records[run];  row = payload[offset + rank * row_bytes :][:row_bytes]
        bits > 0:  element d = (code - 2**(bits - 1)) * alpha[s, bits] + beta[beta_offsets[s] + d],  s = scale_index[t]
        bits = 0:  element d = zero_rows[zero_row_offsets[t] + d], or 0 if the offset is -1

    Attributes:
        tables (tuple[TableShape, ...]): names and logical shapes.
        payload (Tensor): uint8 [P], packed rows, runs 64-byte aligned, 64 bytes of padding at the end.
        run_records (Tensor): int64 [R, 2], 16 bytes a run {int64 base - first*row_bytes, u32 row_bytes, u32 bits}.
        run_starts (Tensor): int32 [R], the rank of each run's first row; 0 for the first run of a table.
        run_offsets (Tensor): int32 [T + 1], the runs of each table.
        rows_per_table (Tensor): int32 [T].
        remap (Tensor): int32 [M], row id to rank, of the tables whose ids are not ranks, one after another.
        remap_offsets (Tensor): int64 [T], where each table's remap starts; -1: its ids are ranks.
        alpha (Tensor): float32 [S, 9], step size of each bit-width for each of S scale sets; alpha[:, 0] = 0.
        beta (Tensor): float32, the offsets of the S scale sets one after another, D floats each.
        beta_offsets (Tensor): int32 [S], where each scale set's offset starts in ``beta``.
        scale_index (Tensor): int32 [T], the scale set of each table.
        zero_rows (Tensor): float32, what 0-bit rows read, D floats for each table that has one.
        zero_row_offsets (Tensor): int32 [T], where each table's vector starts in ``zero_rows``; -1: zeros.
    """

    tables: tuple[TableShape, ...]
    payload: Tensor
    run_records: Tensor
    run_starts: Tensor
    run_offsets: Tensor
    rows_per_table: Tensor
    remap: Tensor
    remap_offsets: Tensor
    alpha: Tensor
    beta: Tensor
    beta_offsets: Tensor
    scale_index: Tensor
    zero_rows: Tensor
    zero_row_offsets: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by attribute name, in the order of the op's arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tables"}

    def layouts(self) -> tuple[TableLayout, ...]:
        """The runs of each table, read from the tensors."""
        starts, records = self.run_starts.tolist(), self.run_records.tolist()
        offsets, remaps = self.run_offsets.tolist(), self.remap_offsets.tolist()
        layouts: list[TableLayout] = []
        for t, table in enumerate(self.tables):
            firsts = starts[offsets[t] : offsets[t + 1]]
            stops = [*firsts[1:], table.num_embeddings]
            runs = tuple(
                Run.from_record((records[k][0], records[k][1]), first, stop - first)
                for k, (first, stop) in enumerate(zip(firsts, stops, strict=True), start=offsets[t])
            )
            layouts.append(TableLayout(table.name, table.num_embeddings, table.embedding_dim, runs, remaps[t] >= 0))
        return tuple(layouts)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
