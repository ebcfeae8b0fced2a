"""TorchRec's sharding planner for tables trained and served at mixed precision."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import EmbeddingOffloadScaleupProposer
from torchrec.distributed.planner.types import (
    Enumerator,
    ParameterConstraints,
    Partitioner,
    PerfModel,
    PlanLoader,
    PlannerError,
    PlannerErrorType,
    Proposer,
    ShardingOption,
    Stats,
    StorageReservation,
    Topology,
)
from torchrec.distributed.types import ModuleSharder, PipelineType, ShardingPlan

from torchrec_mpe.distributed.default_sharders import sharders as default_sharders
from torchrec_mpe.distributed.planner.constraints import (
    as_the_user_constrained,
    complete_constraints,
    without_needless_row_wise,
)
from torchrec_mpe.distributed.planner.insufficient_memory import Asked, explain
from torchrec_mpe.distributed.planner.packed_placement import PackedPlacement, place_packed, place_tables
from torchrec_mpe.distributed.planner.perf_estimator import MPEPerfEstimator
from torchrec_mpe.distributed.planner.plan_report import PlanReport
from torchrec_mpe.distributed.planner.shard_size_proposer import ShardSizeProposer, default_proposers
from torchrec_mpe.distributed.planner.storage_estimator import MPEStorageEstimator
from torchrec_mpe.distributed.planner.storage_reservation import MPEStorageReservation
from torchrec_mpe.modules.embedding_bag_collection import Phase
from torchrec_mpe.packing.table_coding import TableCoding
from torchrec_mpe.precision.frequency_counter import embedding_bag_configs
from torchrec_mpe.precision.plan import PrecisionPlan
from torchrec_mpe.upstream.planner import SearchingPlanner, reserved_share

# Row-wise shards above which a second search, with all of them, would take minutes.
_MAX_SHARDS = 32_768
_NOTHING_FITS = (PlannerErrorType.INSUFFICIENT_STORAGE, PlannerErrorType.STRICT_CONSTRAINTS, PlannerErrorType.PARTITION)


class MPEShardingPlanner(SearchingPlanner):
    """An EmbeddingShardingPlanner that knows what mixed-precision training and serving need.

    It is used like TorchRec's, and differs in this:

    - Storage and step time count the search and retrain phases' row maps, unpooled rows and gradients, and the fused
      optimizer's state (:class:`MPEStorageEstimator`, :class:`MPEPerfEstimator`).
    - Tables of MPEEmbeddingBagCollections stay in fused TBEs unless constrained otherwise; those with a CacheConfig are
      cached. How often their caches miss is taken from ``ParameterConstraints.cache_params.stats``, else assumed
      (:func:`torchrec_mpe.distributed.planner.cache_load.cache_load`).
    - Planning takes seconds for hundreds of tables on hundreds of devices.
    - Where nothing fits, the error lists the tables' bytes and changes with which a plan was found.

    A model is sharded once for search and retraining. The search holds more, so plan it prepared for the search.

    Args:
        topology (Optional[Topology]): devices; those of the process group by default.
        batch_size (Optional[int]): of each rank; 512 by default, as TorchRec's.
        enumerator (Optional[Enumerator]): to be used as it is, with constraints and estimators of its own. By default
            TorchRec's, with the estimators above.
        storage_reservation (Optional[StorageReservation]): :class:`MPEStorageReservation` of 15% by default.
        proposer (Optional[Union[Proposer, List[Proposer]]]): by default those of :func:`default_proposers`.
        constraints (Optional[Dict[str, ParameterConstraints]]): by table name. What they leave open is completed, see
            :func:`torchrec_mpe.distributed.planner.constraints.complete_constraints`.
        partitioner, performance_model, stats, debug, callbacks, timeout_seconds, plan_loader: as TorchRec's.
        pipeline_type (PipelineType): of the training pipeline, for the memory of batches in flight.
        phase (Optional[Phase]): to be planned for; that which each collection is in by default. For planning before
            there are counts or a precision plan.
        count_lookups (bool): lookups are counted during training.

    Example::

        tables = [EmbeddingBagConfig(name="t1", num_embeddings=10**8, embedding_dim=64, feature_names=["f1"])]
        model = MPEEmbeddingBagCollection(tables, device=torch.device("meta"))
        prepare_search_(model, counts)                              # lookups of every row
        topology = Topology(world_size=2, compute_device="cuda", hbm_cap=80 * 10**9)
        planner = MPEShardingPlanner(topology, batch_size=512)
        plan = planner.plan(model, sharders({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD}))
        print(planner.report())                                     # bytes by table and kind
        precision = precision_from_frequencies(counts, tables, ratio=30)
        print(planner.replan(precision))                            # the packed model: fits one device

        plan = planner.collective_plan(model, sharders(fused_params), dist.GroupMember.WORLD)     # in a job
    """

    def __init__(
        self,
        topology: Topology | None = None,
        batch_size: int | None = None,
        enumerator: Enumerator | None = None,
        storage_reservation: StorageReservation | None = None,
        proposer: Proposer | list[Proposer] | None = None,
        partitioner: Partitioner | None = None,
        performance_model: PerfModel | None = None,
        stats: Stats | list[Stats] | None = None,
        constraints: dict[str, ParameterConstraints] | None = None,
        debug: bool = True,
        callbacks: list[Callable[[list[ShardingOption]], list[ShardingOption]]] | None = None,
        timeout_seconds: int | None = None,
        plan_loader: PlanLoader | None = None,
        *,
        pipeline_type: PipelineType = PipelineType.NONE,
        phase: Phase | None = None,
        count_lookups: bool = False,
    ) -> None:
        super().__init__(
            topology=topology,
            batch_size=batch_size,
            enumerator=enumerator,
            storage_reservation=storage_reservation or MPEStorageReservation(),
            proposer=proposer,
            partitioner=partitioner,
            performance_model=performance_model,
            stats=stats,
            constraints=constraints,
            debug=debug,
            callbacks=callbacks,
            timeout_seconds=timeout_seconds,
            plan_loader=plan_loader,
        )
        self._user_constraints = constraints
        self._own_enumerator = enumerator is None
        self._own_proposers = proposer is None
        proposers = proposer if isinstance(proposer, list) else [proposer]
        self._offload = any(isinstance(one, EmbeddingOffloadScaleupProposer) for one in proposers)
        self._pipeline_type = pipeline_type
        self._phase = phase
        self._count_lookups = count_lookups
        self._only_whether_it_fits = False
        self._storage_estimator: MPEStorageEstimator | None = None

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """A sharding plan that fits and is fast.

        Args:
            module (nn.Module): to be sharded; the meta device is fine.
            sharders (List[ModuleSharder]): those that DistributedModelParallel gets, :func:`torchrec_mpe.sharders`.

        Returns:
            ShardingPlan: for DistributedModelParallel.

        Raises:
            PlannerError: if nothing fits, with bytes by table and a change that makes it fit.
            ValueError: if a table's constraints cannot be met, naming it.
        """
        try:
            return self._search(module, sharders)
        except PlannerError as error:
            if self._own_enumerator and error.error_type in _NOTHING_FITS:
                raise self._explained(module, sharders, error.error_type) from error
            raise

    def collective_plan(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        pg: dist.ProcessGroup | None = None,
    ) -> ShardingPlan:
        """:meth:`plan` on rank 0, whose plan or error every rank gets: none waits for a plan that does not come.

        Args:
            module, sharders: as :meth:`plan`; :func:`torchrec_mpe.sharders` if None.
            pg (Optional[ProcessGroup]): the world by default.

        Raises:
            PlannerError, ValueError: as :meth:`plan`, on every rank.
        """
        group = pg or dist.GroupMember.WORLD
        if group is None:
            raise RuntimeError("collective_plan needs a process group: initialize one, or call plan()")
        found: list[ShardingPlan | tuple[str, PlannerErrorType | None] | None] = [None]
        failed: Exception | None = None
        if dist.get_rank(group) == 0:
            try:
                found = [self.plan(module, sharders or default_sharders())]
            except (PlannerError, ValueError) as error:
                failed = error
                found = [(str(error), getattr(error, "error_type", None))]
        dist.broadcast_object_list(found, group=group, group_src=0)
        if failed is not None:
            raise failed
        result = found[0]
        if isinstance(result, tuple):
            message, kind = result
            raise ValueError(message) if kind is None else PlannerError(message, kind)
        return result

    def _search(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """As :meth:`plan`, but where nothing fits, with TorchRec's error and without looking for a change."""
        self.forget_plan()
        if not self._own_enumerator:
            return super().plan(module, sharders)
        complete = self._complete_constraints(module, sharders)
        narrow = without_needless_row_wise(module, self.topology, complete, self._user_constraints)
        if self._own_proposers:
            self.propose_with(default_proposers(len(embedding_bag_configs(module)), self.topology.world_size))
        try:
            return self._search_with(narrow, module, sharders)
        except PlannerError:
            shards = len(complete) * self.topology.world_size
            if narrow == complete or self._only_whether_it_fits or shards > _MAX_SHARDS:
                raise
        return self._search_with(complete, module, sharders)

    def _search_with(
        self,
        constraints: dict[str, ParameterConstraints],
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
    ) -> ShardingPlan:
        self._enumerate_with(constraints)
        return super().plan(module, sharders)

    def _enumerate_with(self, constraints: dict[str, ParameterConstraints]) -> MPEStorageEstimator:
        topology = self.topology
        estimator = MPEStorageEstimator(topology, constraints, self._pipeline_type, self._phase, self._count_lookups)
        self._storage_estimator = estimator
        estimators = [MPEPerfEstimator(topology, constraints, self._phase), estimator]
        told = as_the_user_constrained(constraints, self._user_constraints)  # what statistics call constrained
        self.search_among(EmbeddingEnumerator(topology, self.batch_size, constraints, estimators), told)
        return estimator

    def _complete_constraints(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]
    ) -> dict[str, ParameterConstraints]:
        return complete_constraints(module, sharders, self.topology, self._user_constraints, offload=self._offload)

    def options(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]
    ) -> tuple[list[ShardingOption], MPEStorageEstimator, Topology]:
        """Every table's sharding options with estimates, the estimator, and the topology less what is reserved."""
        complete = self._complete_constraints(module, sharders)
        narrow = without_needless_row_wise(module, self.topology, complete, self._user_constraints)
        estimator = self._enumerate_with(narrow)
        return self.search_space(module, sharders), estimator, self.reserved_topology(module, sharders)

    def _explained(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]], kind: PlannerErrorType
    ) -> PlannerError:
        """The error of a search that found no plan, with bytes and what would fit."""

        def plan_again(**changes: Any) -> Callable[[], PlanReport] | None:
            planner = self._with_changes(**changes)
            try:
                planner._search(module, sharders)
            except PlannerError:
                return None
            return planner.report

        options, estimator, reserved = self.options(module, sharders)
        bytes_of_options = [(option, estimator.shard_bytes(option)) for option in options]
        asked = Asked(
            module, self.topology, self.batch_size, dict(self._user_constraints or {}), self.storage_reservation
        )
        return explain(kind, asked, bytes_of_options, reserved, plan_again)

    def _with_changes(
        self,
        topology: Topology | None = None,
        batch_size: int | None = None,
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> "MPEShardingPlanner":
        """A planner with the same settings but for these, that takes the first plan it finds."""
        planner = MPEShardingPlanner(
            topology or self.topology,
            batch_size or self.batch_size,
            storage_reservation=copy.deepcopy(self.storage_reservation),
            proposer=ShardSizeProposer(first_that_fits=True),
            partitioner=self.partitioner,
            stats=[],
            constraints=self._user_constraints if constraints is None else constraints,
            debug=False,
            pipeline_type=self._pipeline_type,
            phase=self._phase,
            count_lookups=self._count_lookups,
        )
        planner._only_whether_it_fits = True
        return planner

    def report(self) -> PlanReport:
        """Bytes by table and device of the last plan, on the process that made it.

        Raises:
            RuntimeError: if there is none, or it was made with an enumerator that was passed in.
        """
        reserved = self.storage_reservation.last_reserved_topology
        best, estimator = self.best_plan, self._storage_estimator
        if best is None or estimator is None or reserved is None:
            raise RuntimeError("there is no plan to report on: call plan() first, on this process")
        return PlanReport.of(best, [estimator.shard_bytes(option) for option in best], reserved)

    def replan(
        self, precision: PrecisionPlan | Mapping[str, TableCoding], *, available: int | None = None
    ) -> PackedPlacement:
        """Where the packed tables go, on as few devices as hold them.

        Args:
            precision (PrecisionPlan | Mapping[str, TableCoding]): bit-widths or coding of every table.
            available (Optional[int]): bytes of a device for packed tables; by default what the reservation's percentage
                leaves of the smallest device of the topology.

        Raises:
            PlannerError: if the topology has too few devices, with the bytes of each table and how many would do.
        """
        if available is None:
            devices = self.topology.devices
            cpu = self.topology.compute_device == "cpu"
            smallest = min(device.storage.ddr if cpu else device.storage.hbm for device in devices)
            available = int(smallest * (1 - reserved_share(self.storage_reservation)))
        if isinstance(precision, PrecisionPlan):
            return place_packed(precision, available, self.topology.world_size)
        return place_tables(precision, available, self.topology.world_size, learned_zero_rows=True)
