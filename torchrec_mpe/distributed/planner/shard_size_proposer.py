"""Sharding plans proposed by an upper bound on the size of shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import Enumerator, Proposer, ShardingOption, Topology

_HALVINGS = 10
# Above so many shards of row-wise tables, TorchRec's proposers, which try options one table at a time, take minutes.
_MAX_PLACEMENTS = 2_048
_MAX_GRID_PROPOSALS = 256


@dataclass(frozen=True)
class _Candidate:
    """An option, its estimated time over all ranks in ms, and memory and time of its largest shard."""

    option: ShardingOption
    cost: float
    of_shard: Mapping[str, float]


def _fastest_within(of_table: Sequence[_Candidate], kind: str, bound: float) -> ShardingOption:
    """The first candidate whose shards are within the bound, or that with the smallest shards."""
    for candidate in of_table:
        if candidate.of_shard[kind] <= bound:
            return candidate.option
    return min(of_table, key=lambda candidate: candidate.of_shard[kind]).option


class ShardSizeProposer(Proposer):
    """Proposes for every table its fastest sharding option whose shards are small enough.

    The bound on a shard's memory starts at the largest shard of the search space and is halved from proposal to
    proposal, and so is, in proposals of their own, the bound on its estimated time: from whole tables where they are
    fast to all tables split. About 20 proposals, whatever the number of tables; TorchRec's GreedyProposer makes one for
    each option of each table.

    Args:
        first_that_fits (bool): propose nothing more once a proposal could be placed: for finding out whether one can.
    """

    def __init__(self, first_that_fits: bool = False) -> None:
        self._first_that_fits = first_that_fits
        self._proposals: list[list[ShardingOption]] = []

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Make the proposals for a search space with estimates."""
        options: dict[str, list[_Candidate]] = {}
        for option in search_space:
            memory = max(shard.storage.hbm or shard.storage.ddr for shard in option.shards)
            times = [shard.perf.total for shard in option.shards]
            candidate = _Candidate(option, sum(times), {"memory": memory, "time": max(times)})
            options.setdefault(option.fqn, []).append(candidate)
        for of_table in options.values():
            of_table.sort(key=lambda candidate: candidate.cost)
        every = [candidate for of_table in options.values() for candidate in of_table]
        bounds = {kind: max((c.of_shard[kind] for c in every), default=0.0) for kind in ("memory", "time")}
        self._proposals = []
        seen: set[tuple[int, ...]] = set()
        for halving in range(_HALVINGS + 1):
            for kind, bound in bounds.items():
                chosen = [_fastest_within(of_table, kind, bound / 2**halving) for of_table in options.values()]
                key = tuple(map(id, chosen))
                if key not in seen:
                    seen.add(key)
                    self._proposals.append(chosen)
        self._proposals.reverse()

    def propose(self) -> list[ShardingOption] | None:
        """The next proposal, None after the last."""
        return self._proposals[-1] if self._proposals else None

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Go on to the next proposal."""
        if partitionable and self._first_that_fits:
            self._proposals.clear()
        elif self._proposals:
            self._proposals.pop()


def default_proposers(tables: int, world_size: int) -> list[Proposer]:
    """Proposers that end within seconds.

    ShardSizeProposer and TorchRec's UniformProposer; for up to 2,048 table shards also TorchRec's GreedyProposers, and
    its GridSearchProposer where the grid is small.
    """
    proposers: list[Proposer] = [ShardSizeProposer(), UniformProposer()]
    if tables * world_size <= _MAX_PLACEMENTS:
        proposers += [GreedyProposer(), GreedyProposer(use_depth=False), GridSearchProposer(_MAX_GRID_PROPOSALS)]
    return proposers
