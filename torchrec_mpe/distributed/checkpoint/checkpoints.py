"""Save and load the whole state of a training run."""

import os
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_mpe.distributed.checkpoint.cached_tables import check_no_batch_in_flight
from torchrec_mpe.distributed.checkpoint.checkpoint import (
    COUNTS_FILE,
    MANIFEST,
    PLAN_FILE,
    Checkpoint,
    damage,
    write_manifest,
)
from torchrec_mpe.distributed.checkpoint.extra import as_json, check_extra, extra_state, of_ranks, set_extra
from torchrec_mpe.distributed.checkpoint.folder import CheckpointFolder
from torchrec_mpe.distributed.checkpoint.fused_optimizer import merge_descriptions
from torchrec_mpe.distributed.checkpoint.preparation import check_prepared_with
from torchrec_mpe.distributed.checkpoint.ranks import Ranks
from torchrec_mpe.distributed.checkpoint.training_state import OptimizerStateChoice, TrainingState, differing
from torchrec_mpe.modules.embedding_bag_collection import Phase
from torchrec_mpe.precision.frequency_counter import FrequencyCounter
from torchrec_mpe.precision.plan import PrecisionPlan
from torchrec_mpe.upstream import checkpoint as dcp
from torchrec_mpe.upstream.versions import installed_versions


@dataclass
class _Save:
    """A save that has begun: whether all ranks have written, and on rank 0 whether it is complete."""

    step: int
    written: "Future[Any]"
    published: "Future[None]"


@dataclass(frozen=True)
class _Shared:
    """The counts or plan that the last save referred to: large ones are not digested again at each save."""

    content: object
    layout_digests: Mapping[str, int]
    name: str

    def of(self, content: object, state: TrainingState) -> bool:
        return self.content is content and self.layout_digests == state.layout_digests()


class Checkpoints:
    """The checkpoints of one training run, in any phase, in a folder that all ranks see.

    A checkpoint holds the sharded rows and their fused optimizer state, the quantizers (gamma, alpha, beta, 0-bit
    vectors), the dense network and its optimizer, the state of random number generators, the position in the data, and
    what it takes to prepare a model again: search settings and counts, or the precision plan. Counts and plans are
    stored once beside the checkpoints that refer to them. It may be loaded by another number of ranks and under another
    sharding.

    A checkpoint is written under a hidden name and renamed when all ranks are done and it is on disk. A job killed at
    any moment leaves the previous one to load; the next save clears away what it left.

    Cached tables are saved as they are stored: every save writes the rows in their caches back, with the optimizer
    state that is saved with them, and empties the caches.

    All methods are collective: every rank calls them in the same order. One job at a time uses a folder.

    The tensors are written by torch.distributed.checkpoint (DCP) in its own format. DCP's index file, ``.metadata``, is
    a pickle: load checkpoints only from folders whose writers you trust. DCP's safetensors writer has no pickle, but
    keeps one shard a rank of a tensor: of a table with two column shards on a rank it loses one (torch 2.13).

    Args:
        folder (str): made by the first save.
        keep (int): complete checkpoints to keep; older ones are deleted once a newer one is complete.
        timeout (Optional[timedelta]): how much longer the slowest rank may take than the fastest; gloo's default if
            None.

    Example::

        checkpoints = Checkpoints("checkpoints")
        found = checkpoints.newest()
        counts = found.counts() if found else count_frequencies(batches, model).merge_across_ranks()
        if found:
            found.prepare_(model)                       # into the phase of the checkpoint, here the search
        else:
            prepare_search_(model, counts)
        dmp = DistributedModelParallel(model, sharders=sharders(fused_params), ...)
        optimizer = torch.optim.Adam([p for _, p in in_backward_optimizer_filter(dmp.named_parameters())])
        if found:
            checkpoints.load(dmp, optimizer, found)     # go on at found.position
        ...
        checkpoints.save(dmp, optimizer, step=120, position={"epoch": 0, "batch": 120}, counts=counts)
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2, timeout: timedelta | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self._folder = CheckpointFolder(self.folder, keep)
        self._ranks = Ranks(timeout)
        self._pending: _Save | None = None
        self._shared: dict[str, _Shared] = {}
        self._verified: set[Path] = set()

    def save(
        self,
        model: DistributedModelParallel,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        step: int,
        position: Mapping[str, Any] | None = None,
        counts: Mapping[str, Tensor] | None = None,
        plan: PrecisionPlan | None = None,
        extra: Mapping[str, Stateful] | None = None,
        asynchronous: bool = False,
    ) -> None:
        """Write a checkpoint.

        Args:
            model (DistributedModelParallel): in any phase.
            optimizer (Optional[torch.optim.Optimizer]): of all but the rows in fused TBEs; a KeyedOptimizerWrapper or a
                CombinedOptimizer of such, with or without ``model.fused_optimizer``, will do.
            step (int): number of steps done, for people and logs.
            position (Optional[Mapping[str, Any]]): where in the data to go on, JSON values; rank 0's is kept.
            counts (Optional[Mapping[str, Tensor]]): the counts that the model was prepared with; needed in the search
                phase.
            plan (Optional[PrecisionPlan]): the plan that the model was prepared with; needed in the retrain phase.
            extra (Optional[Mapping[str, Stateful]]): other objects with ``state_dict`` and ``load_state_dict``, for
                example a learning-rate scheduler; their states must be JSON values.
            asynchronous (bool): return when this rank's tensors are copied to host memory, and write in a thread. The
                checkpoint is complete some time later, at the latest when :meth:`wait` returns: call that before the
                process group is destroyed.

        Raises:
            ValueError: if counts or plan are missing or not those of the model.
            TypeError: for state that cannot be saved.
            RuntimeError: if writing fails here or on another rank, or a pending save failed; the earlier checkpoints
                are untouched.
        """
        self.wait()
        if not isinstance(model, DistributedModelParallel):
            raise TypeError(f"a {type(model).__name__} is not sharded: save the DistributedModelParallel that trains")
        ranks = self._ranks
        extra_tensors, extra_values = extra_state(extra or {})
        state = ranks.together(partial(TrainingState, model, optimizer))
        local_buffers = differing(ranks.gather(ranks.together(state.buffer_digests)))
        tensors = ranks.together(lambda: {**state.tensors(ranks.rank, local_buffers), **extra_tensors})
        manifest = ranks.together(
            lambda: {
                "step": int(step),
                "position": as_json("position", dict(position or {})),
                "world_size": ranks.world_size,
                **state.values(),
                "local_buffers": local_buffers,
                "extra": extra_values,
                "versions": installed_versions(),
            }
        )
        manifest["extra_of_ranks"] = of_ranks(ranks.gather(extra_values))
        manifest["tables"] = merge_descriptions(ranks.gather(ranks.together(state.local_tables)))
        temporary, target, shared = ranks.on_rank_0(lambda: self._begin(model, state, step, counts, plan))
        manifest.update(shared)

        def publish(written: "Future[Any]") -> None:
            """On rank 0, when all ranks have written: in DCP's thread if asynchronous."""
            try:
                written.result()
                digests = self._folder.take_digests(temporary)
                files = {name: (temporary / name).stat().st_size for name in digests}
                write_manifest(temporary / MANIFEST, {**manifest, "files": files, "file_sha256": digests})
                self._folder.publish(temporary, target)
                pending.published.set_result(None)
            except BaseException as error:
                self._folder.discard(temporary)
                pending.published.set_exception(error)

        write = dcp.save_in_thread if asynchronous else dcp.save
        pending = _Save(step, write(tensors, temporary, ranks.group()), Future())
        if ranks.rank == 0:
            pending.written.add_done_callback(publish)
        else:
            pending.published.set_result(None)
        self._pending = pending
        if not asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until a pending asynchronous save is complete; at once if there is none.

        Raises:
            RuntimeError: if it failed, here or on another rank; the earlier checkpoints are untouched.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        message = None
        for future in (pending.written, pending.published):
            try:
                future.result()
            except dcp.FAILURES as error:
                message = message or dcp.reason(error)
        failed = {rank: text for rank, text in enumerate(self._ranks.gather(message)) if text is not None}
        if failed:
            rank, text = min(failed.items())
            raise RuntimeError(
                f"the checkpoint of step {pending.step} could not be written to {self.folder}: rank {rank}: {text}"
            )

    def newest(self, *, verify: bool = True) -> Checkpoint | None:
        """The complete checkpoint saved last, the same on every rank, or None; a pending save is waited for.

        A damaged one is passed over with a warning: of which the manifest cannot be read, files are missing or cut
        short, or, with ``verify``, a file has another digest than when it was saved. That reads everything, each file
        on one of the ranks and in several threads, before :meth:`load` does: what fits into the hosts' file caches is
        read from disk once.

        Raises:
            RuntimeError: if a pending save failed.
        """
        for checkpoint in reversed(self.complete()):
            damaged = self._damage(checkpoint) if verify else None
            if damaged is None:
                return checkpoint
            if self._ranks.rank == 0:
                warnings.warn(f"passed over: {damaged}", RuntimeWarning, stacklevel=2)
        return None

    def complete(self) -> list[Checkpoint]:
        """All complete checkpoints, oldest first, the same on every rank, as :meth:`newest` without ``verify``."""
        self.wait()
        return self._ranks.on_rank_0(self._folder.complete)

    def load(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        checkpoint: Checkpoint,
        *,
        optimizer_state: OptimizerStateChoice = True,
        extra: Mapping[str, Stateful] | None = None,
    ) -> None:
        """Load a checkpoint into a model of the same tables and phase, sharded in whatever way.

        Everything that can be checked is checked before anything is changed, the digests of all files too, unless
        :meth:`newest` has done it. Learning rates are those of the checkpoint.

        Args:
            model (nn.Module): a DistributedModelParallel; or an unsharded model, with ``optimizer_state=False``.
            optimizer (Optional[torch.optim.Optimizer]): of all but the rows in fused TBEs, over the same parameters in
                the same groups as the saved one; None to leave its state out.
            checkpoint (Checkpoint): from :meth:`newest` or :meth:`complete`.
            optimizer_state (Union[bool, str]): True, the fused optimizers' state of every table; "where possible",
                tables whose state cannot be moved to their sharding here start with an empty one; False, all tables do.
                A cached table's stored rows hold their state, and are loaded only where it takes as many bytes.
            extra (Optional[Mapping[str, Stateful]]): as given to :meth:`save`, or some of it.

        Random number generators and buffers go on as they were, each rank's own. On another number of ranks generators
        are seeded anew from the checkpoint, with a warning, and buffers are rank 0's.

        With the same ranks and sharding training goes on bit for bit as without the interruption, on CPU with one or
        two ranks. With more, DistributedDataParallel adds up the dense gradients of the first step after a start in
        another order than later: last bits differ, unless the model is made with ``data_parallel_wrapper=
        DefaultDataParallelWrapper(static_graph=False, find_unused_parameters=True)``.

        Raises:
            ValueError: if a file of the checkpoint is damaged; if it is of another phase, preparation, tables or
                optimizer, or with ``optimizer_state=True`` the fused optimizer state of some tables, which are named,
                cannot be moved.
            KeyError: if the checkpoint has no ``extra`` of a name.
            RuntimeError: before anything is changed, naming the tables, if a forward of cached tables waits for its
                backward: drop its output; or if reading fails here or on another rank: the model is then neither old
                nor new.
        """
        self.wait()
        ranks = self._ranks
        extra = extra or {}
        if damaged := self._damage(checkpoint):
            raise ValueError(damaged)
        saved = ranks.together(partial(dcp.saved_tensors, checkpoint.path))
        # First: making the state writes back only rows that no batch in flight has.
        ranks.together(partial(check_no_batch_in_flight, model))
        state = ranks.together(partial(TrainingState, model, optimizer))
        tables = merge_descriptions(ranks.gather(ranks.together(state.local_tables)))
        ranks.together(lambda: state.check_loadable(checkpoint, saved, tables))
        fresh = ranks.together(lambda: state.without_state(checkpoint, tables, optimizer_state))
        extra_tensors, _ = extra_state(extra)
        ranks.together(lambda: check_extra(extra, extra_tensors, checkpoint, saved, ranks.rank, ranks.world_size))
        targets = ranks.together(lambda: state.targets(checkpoint, saved, fresh, ranks.rank, ranks.world_size))
        try:
            dcp.load({**targets, **extra_tensors}, checkpoint.path, ranks.group())
        except dcp.FAILURES as error:
            raise RuntimeError(f"checkpoint {checkpoint.path} could not be loaded: {dcp.reason(error)}") from error
        set_extra(extra, extra_tensors, checkpoint, ranks.rank, ranks.world_size)
        ranks.together(lambda: state.set(targets, checkpoint, fresh, ranks.rank, ranks.world_size))

    def _damage(self, checkpoint: Checkpoint) -> str | None:
        """The same on every rank."""
        if checkpoint.path in self._verified:
            return None
        found = self._ranks.gather(damage(checkpoint, self._ranks.rank, self._ranks.world_size))
        first = next(filter(None, found), None)
        if first is None:
            self._verified.add(checkpoint.path)
        return first

    def _begin(
        self,
        model: nn.Module,
        state: TrainingState,
        step: int,
        counts: Mapping[str, Tensor] | None,
        plan: PrecisionPlan | None,
    ) -> tuple[Path, Path, dict[str, str | None]]:
        """On rank 0: a folder to write to, its name when complete, and the names of shared counts and plan."""
        shared: dict[str, str | None] = {"counts": None, "plan": None}
        kind, content = {Phase.SEARCH: ("counts", counts), Phase.RETRAIN: ("plan", plan)}.get(state.phase, ("", None))
        known = kind in self._shared and self._shared[kind].of(content, state)
        if not known:
            check_prepared_with(model, counts, plan)
        temporary, target = self._folder.begin(state.phase.value, step)
        if known:
            shared[kind] = self._shared[kind].name
        elif isinstance(content, PrecisionPlan):
            shared[kind] = self._folder.share(kind, PLAN_FILE, content.save)
        elif content is not None:
            shared[kind] = self._folder.share(kind, COUNTS_FILE, FrequencyCounter.from_counts(content).save)
        name = shared.get(kind)
        # One at a time: what another phase shared may be gone when this one needs it again.
        self._shared = {} if name is None else {kind: _Shared(content, state.layout_digests(), name)}
        return temporary, target, shared
