"""What the groups of a table may be coded as, and what is best at a price of a byte."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchrec_mpe.coding.groups import count_bounds
from torchrec_mpe.coding.levels import GroupLevels, fit_levels
from torchrec_mpe.coding.owned_rows import TableToCode
from torchrec_mpe.coding.sample import sample_rows
from torchrec_mpe.coding.size import LEVEL_BYTES, CodedRun, TableRuns
from torchrec_mpe.coding.transform import fit_transform
from torchrec_mpe.ops.directory import BITMAP_ROWS, LINE_BYTES
from torchrec_mpe.ops.reference.run_coding import COMPONENT_BLOCKS
from torchrec_mpe.packing.bit_widths import MAX_BITS
from torchrec_mpe.packing.layout import RUN_BYTES
from torchrec_mpe.packing.table_coding import PlainRows, RowCoding, TransformedRows
from torchrec_mpe.precision.frequency_order import counts_in_order, frequency_order

_COMPUTE_PRICE = 1.0  # bytes that a multiplication by an element of the basis, one each bag, may save or cost


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of the places ``first`` to ``stop - 1``, and their levels."""

    first: int
    stop: int
    levels: GroupLevels


@dataclass(frozen=True, eq=False)
class GroupChoice:
    """A coding of some rows.

    Attributes:
        first, stop (int): their places.
        group (Group): whose levels they take.
        plain_bits (Optional[int]): the bit-width of plain rows; None: transformed.
        block_bits (tuple[int, ...]): of transformed rows, one bit-width a block of components.
        error (float): in the metric, weighted.
    """

    first: int
    stop: int
    group: Group
    plain_bits: int | None
    block_bits: tuple[int, ...]
    error: float

    @property
    def rows(self) -> int:
        return self.stop - self.first

    def coded_alike(self, other: "GroupChoice") -> bool:
        """Whether kind and widths are the same."""
        return self.plain_bits == other.plain_bits and self.block_bits == other.block_bits

    def part(self, first: int, stop: int, share: float) -> "GroupChoice":
        """The same coding for some of the rows, which have this share of the error."""
        return GroupChoice(first, stop, self.group, self.plain_bits, self.block_bits, share * self.error)

    def coding(self, components: int) -> RowCoding:
        """With levels."""
        levels = self.group.levels
        if self.plain_bits is not None:
            return PlainRows(self.plain_bits, float(levels.step_sizes[self.plain_bits - 1]) if self.plain_bits else 0.0)
        widths = [*self.block_bits, *[0] * (len(COMPONENT_BLOCKS) - len(self.block_bits))]
        bits = [
            (k, block_bits)
            for block_bits, (low, high) in zip(widths, COMPONENT_BLOCKS, strict=True)
            if block_bits
            for k in range(low, min(high, components))
        ]
        return TransformedRows(
            tuple(widths),
            tuple(float(levels.scales[b - 1, k]) for k, b in bits),
            tuple(float(levels.offsets[b - 1, k]) for k, b in bits),
            components,
        )


@dataclass(frozen=True, eq=False)
class TableChoice:
    """A coding of a table: of the groups that have been looked up, in order."""

    components: int
    groups: tuple[GroupChoice, ...]

    @property
    def error(self) -> float:
        return sum(group.error for group in self.groups)


@dataclass(frozen=True, eq=False)
class _Costs:
    """Errors and bytes of many groups.

    Attributes:
        rows (Tensor): float64 [G].
        energy (Tensor): float64 [G].
        blocks (Tensor): float64 [G, J, 9], what each width of a block of components adds to the energy.
        plain (Tensor): float64 [G, 9]; at 0 the error of the zero row.
    """

    rows: Tensor
    energy: Tensor
    blocks: Tensor
    plain: Tensor

    def pairs(self) -> "_Costs":
        """Of neighbours together, were each fitted alone: less error than one fit of both."""
        return _Costs(*(v[:-1] + v[1:] for v in (self.rows, self.energy, self.blocks, self.plain)))


@dataclass(frozen=True, eq=False)
class _Best:
    """The best codings of many groups at a price.

    Attributes:
        transformed (Tensor): float64 [G, J], costs, by blocks in use.
        widths (Tensor): int64 [G, J], of each block.
        plain (Tensor): float64 [G, 2], costs, with 0 bits allowed and without.
        plain_bits (Tensor): int64 [G, 2].
    """

    transformed: Tensor
    widths: Tensor
    plain: Tensor
    plain_bits: Tensor

    def costs(self, blocks: int) -> Tensor:
        """Float64 [G], where the first ``blocks`` blocks of components may be used."""
        return self.plain[:, 0] if blocks == 0 else torch.minimum(self.plain[:, 1], self.transformed[:, blocks - 1])


class TableCandidates:
    """A table in groups of neighbouring rows, each of which is measured at every coding.

    Args:
        table (TableToCode): read once, and then a sample of it.
        max_components (int): K at most.

    Attributes:
        transform (Transform): of the table.
        order (Optional[Tensor]): int32 [num_embeddings], the place of each row.
        seen (int): rows that have been looked up: the first of the frequency order.
        zero_row (Tensor): float32 [D].
        groups (list[Group]): of these rows.
    """

    def __init__(self, table: TableToCode, max_components: int) -> None:
        self.name, self.rows, self.dim = table.name, table.num_embeddings, table.embedding_dim
        self.transform = fit_transform(table)
        self.order = frequency_order(table.counts)
        bounds = count_bounds(counts_in_order(table.counts, self.order))
        self.seen = bounds[-1]
        self._sample = sample_rows(table, bounds, self.order)
        self.zero_row = self.transform.mean.float() if table.zero_row is None else table.zero_row.float()
        self._measured: dict[tuple[int, int], Group] = {}
        self._blocks = [(a, min(b, max_components, self.dim)) for a, b in COMPONENT_BLOCKS]
        self._blocks = [(low, high) for low, high in self._blocks if low < high]
        bits = torch.arange(MAX_BITS + 1, dtype=torch.float64)
        size = torch.tensor([high - low for low, high in self._blocks], dtype=torch.float64).unsqueeze(1)
        self._block_bytes = size * bits / 8, 2 * LEVEL_BYTES * size * (bits > 0)  # a row, and a run
        self._plain_bytes = -(-self.dim // 8) * bits, LEVEL_BYTES * (bits > 0) + RUN_BYTES
        self._set_groups([self._measure(low, high) for low, high in pairwise(bounds)])

    def _set_groups(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self._costs = self._costs_of(groups)

    def _measure(self, first: int, stop: int) -> Group:
        if (first, stop) not in self._measured:
            levels = fit_levels(self._sample.between(first, stop), self.transform, self.zero_row)
            self._measured[first, stop] = Group(first, stop, levels)
        return self._measured[first, stop]

    def _costs_of(self, groups: Sequence[Group]) -> _Costs:
        count, blocks = len(groups), len(self._blocks)
        costs = _Costs(
            torch.tensor([g.stop - g.first for g in groups], dtype=torch.float64),
            torch.tensor([g.levels.energy for g in groups], dtype=torch.float64),
            torch.zeros(count, blocks, MAX_BITS + 1, dtype=torch.float64),
            torch.zeros(count, MAX_BITS + 1, dtype=torch.float64),
        )
        for k, group in enumerate(groups):
            added = group.levels.components - group.levels.components[:, :1]
            for block, (low, high) in enumerate(self._blocks):
                costs.blocks[k, block] = added[low:high].sum(0)
            costs.plain[k, 0] = group.levels.zero_row
            costs.plain[k, 1:] = group.levels.plain
        return costs

    def _best(self, costs: _Costs, price: float) -> _Best:
        rows = costs.rows.view(-1, 1, 1)
        blocks, widths = (costs.blocks + price * (rows * self._block_bytes[0] + self._block_bytes[1])).min(2)
        transformed = costs.energy.unsqueeze(1) + blocks.cumsum(1) + price * RUN_BYTES
        plain = costs.plain + price * (costs.rows.unsqueeze(1) * self._plain_bytes[0] + self._plain_bytes[1])
        with_zero, without = plain.min(1), plain[:, 1:].min(1)
        return _Best(
            transformed,
            widths,
            torch.stack([with_zero.values, without.values], 1),
            torch.stack([with_zero.indices, without.indices + 1], 1),
        )

    def choose(self, price: float, blocks: int | None = None) -> TableChoice:
        """The least error plus price times bytes.

        Args:
            price (float): of a byte.
            blocks (Optional[int]): blocks of components in use, 0 for none; None: the best number.
        """
        best = self._best(self._costs, price)
        if blocks is None:
            options = range(len(self._blocks) + 1 if self.groups else 1)
            blocks = min(options, key=lambda j: float(best.costs(j).sum()) + price * self._shared_bytes(best, j))
        column = 0 if blocks == 0 else 1
        is_plain = [True] * len(self.groups)
        if blocks:
            is_plain = (best.plain[:, 1] <= best.transformed[:, blocks - 1]).tolist()
        plain_bits, widths = best.plain_bits[:, column].tolist(), best.widths[:, :blocks].tolist()
        choices = []
        for k, (group, plain) in enumerate(zip(self.groups, is_plain, strict=True)):
            bits, of_blocks = (plain_bits[k], ()) if plain else (None, tuple(widths[k]))
            choices.append(
                GroupChoice(group.first, group.stop, group, bits, of_blocks, self._error(k, bits, of_blocks))
            )
        return TableChoice(self._components(blocks), tuple(choices))

    def _error(self, group: int, plain_bits: int | None, block_bits: Sequence[int]) -> float:
        if plain_bits is not None:
            return float(self._costs.plain[group, plain_bits])
        added = sum(float(self._costs.blocks[group, j, b]) for j, b in enumerate(block_bits))
        return max(float(self._costs.energy[group]) + added, 0.0)

    def _components(self, blocks: int) -> int:
        return self._blocks[blocks - 1][1] if blocks else 0

    def blocks_of(self, choice: TableChoice) -> int:
        """Blocks of components in use."""
        return next((j for j, (_, stop) in enumerate(self._blocks, 1) if stop == choice.components), 0)

    def _shared_bytes(self, best: _Best, blocks: int) -> float:
        """What the groups share, and the price of compute."""
        components = self._components(blocks)
        zero_row = self.seen < self.rows or (blocks == 0 and bool((best.plain_bits[:, 0] == 0).any()))
        return self.dim * (2 * (components + 1) + _COMPUTE_PRICE * components + 4 * zero_row)

    def merge_groups(self, price: float, blocks: int) -> bool:
        """Join neighbouring groups whose metadata costs more than the error that one coding for both adds.

        Metadata of a table whose ids are not ranks are also the bits of its directory that tell two groups apart.

        Returns:
            bool: whether there were any.
        """
        before = len(self.groups)
        while len(self.groups) > 1:
            own = self._best(self._costs, price).costs(blocks)
            apart = own[:-1] + own[1:] + price * self._parting_bytes()
            worth = self._best(self._costs.pairs(), price).costs(blocks) < apart
            pairs = torch.nonzero(worth).flatten().tolist()
            if not pairs:
                break
            joined = [self._measure(self.groups[k].first, self.groups[k + 1].stop) for k in pairs]
            gains = apart[pairs] - self._best(self._costs_of(joined), price).costs(blocks)
            merged: dict[int, Group] = {}
            for gain, k in sorted(zip(gains.tolist(), range(len(pairs)), strict=True), reverse=True):
                left = pairs[k]
                if gain > 0 and not merged.keys() & {left - 1, left, left + 1}:
                    merged[left] = joined[k]
            if not merged:
                break
            kept = [g for k, g in enumerate(self.groups) if k not in merged and k - 1 not in merged]
            self._set_groups(sorted([*kept, *merged.values()], key=lambda g: g.first))
        return len(self.groups) < before

    def _parting_bytes(self) -> Tensor:
        """Bytes that a wavelet directory takes to tell each group's rows from the next one's, float64 [G - 1]."""
        if self.order is None:
            return torch.zeros(len(self.groups) - 1, dtype=torch.float64)
        low, high = self._costs.rows[:-1], self._costs.rows[1:]
        bits = low * ((low + high) / low).log2() + high * ((low + high) / high).log2()
        return bits * LINE_BYTES / BITMAP_ROWS

    def runs(self, choice: TableChoice) -> TableRuns:
        """What the bytes of a choice depend on."""
        runs = [self._run(group) for group in joined(choice.groups)]
        unseen = self.rows - self.seen
        if unseen:
            ends_empty = bool(runs) and runs[-1].plain and not runs[-1].row_bits
            before = runs.pop().rows if ends_empty else 0
            runs.append(CodedRun(before + unseen, 0, 0, True))
        zero_row = any(run.plain and not run.row_bits for run in runs)
        return TableRuns(tuple(runs), self.rows, self.dim, choice.components, self.order is not None, zero_row)

    def weight_share(self, group: GroupChoice, stop: int) -> float:
        """The part of a group's weight that its rows before ``stop`` have, as the sample shows it."""
        sample = self._sample.between(group.first, group.stop)
        total = float(sample.weights.sum())
        before = sample.weights[sample.places < stop]
        by_rows = (stop - group.first) / group.rows
        return float(before.sum()) / total if len(before) and total > 0 else by_rows

    def group_bytes(self, group: GroupChoice) -> float:
        """Bytes of a group's rows and metadata, without gaps."""
        run = self._run(group)
        return run.rows * run.row_bits / 8 + LEVEL_BYTES * run.levels + RUN_BYTES

    def _run(self, group: GroupChoice) -> CodedRun:
        if group.plain_bits is not None:
            return CodedRun(group.rows, -(-self.dim // 8) * 8 * group.plain_bits, int(group.plain_bits > 0), True)
        sizes = [(b, high - low) for b, (low, high) in zip(group.block_bits, self._blocks, strict=False) if b]
        return CodedRun(group.rows, sum(b * size for b, size in sizes), 2 * sum(size for _, size in sizes), False)


def joined(groups: Sequence[GroupChoice]) -> list[GroupChoice]:
    """Neighbours without bits as one: nothing is stored of their levels."""
    out: list[GroupChoice] = []
    for group in groups:
        last = out[-1] if out else None
        if last is not None and last.coded_alike(group) and not group.plain_bits and not any(group.block_bits):
            error = last.error + group.error
            out[-1] = GroupChoice(last.first, group.stop, last.group, last.plain_bits, last.block_bits, error)
        else:
            out.append(group)
    return out
