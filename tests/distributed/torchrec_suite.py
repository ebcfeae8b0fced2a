"""TorchRec's own sharding tests with our collection and sharder in place of theirs.

The wheel ships the tests' machinery (torchrec.distributed.test_utils) but not torchrec.distributed.tests, of which
``test_sharding`` imports one sharder; it is only used in tests of 2D parallelism, which need CUDA.
"""

import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torchrec.distributed import comm, model_parallel
from torchrec.distributed.test_utils import test_model
from torchrec.distributed.test_utils.emb_sharder import TestEBCSharder
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import torchrec_mpe as mpe
from tests.distributed.ranks import Ranks
from torchrec_mpe.distributed.embeddingbag import MPEEmbeddingBagCollectionSharder, ShardedMPEEmbeddingBagCollection
from torchrec_mpe.precision.from_frequencies import cut_precision
from torchrec_mpe.precision.row_initialization import RowInitialization

if "torchrec.distributed.tests" not in sys.modules:
    absent = types.ModuleType("torchrec.distributed.tests.test_sequence_model")
    absent.TestEmbeddingCollectionSharder = None  # type: ignore[attr-defined]
    sys.modules["torchrec.distributed.tests"] = types.ModuleType("torchrec.distributed.tests")
    sys.modules["torchrec.distributed.tests.test_sequence_model"] = absent

from torchrec.distributed.test_utils import test_model_parallel, test_model_parallel_base, test_sharding


class Sharder(TestEBCSharder, MPEEmbeddingBagCollectionSharder):  # type: ignore[misc]
    """One sharding type and one kernel, as TorchRec's TestEBCSharder.

    Attributes:
        collections (int): how many this has sharded.
    """

    collections = 0

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """For the planner, which on CPU has no estimates for UVM kernels; :meth:`shard` sets them."""
        return ["fused"] if self._kernel_type.startswith("fused") else [self._kernel_type]

    def shard(
        self, module: mpe.MPEEmbeddingBagCollection, params: dict[str, ParameterSharding], *args: Any, **kwargs: Any
    ) -> ShardedMPEEmbeddingBagCollection:
        self.collections += 1
        for sharding in params.values():
            sharding.compute_kernel = self._kernel_type
        return MPEEmbeddingBagCollectionSharder.shard(self, module, params, *args, **kwargs)


def create_sharder(sharder_type: str, sharding_type: str, kernel_type: str, *args: Any, **kwargs: Any) -> Sharder:
    """In place of TorchRec's create_test_sharder."""
    stock = test_sharding.create_test_sharder(sharder_type, sharding_type, kernel_type, *args, **kwargs)
    assert type(stock) is TestEBCSharder, f"{sharder_type} is not a collection of embedding bags"
    return Sharder(sharding_type, kernel_type, stock.fused_params, stock.qcomm_codecs_registry)


def _counts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    configs = [
        t for m in model.modules() if isinstance(m, EmbeddingBagCollection) for t in m.embedding_bag_configs()
    ]  # fmt: skip
    return {t.name: torch.arange(t.num_embeddings).flip(0) for t in configs}


_INITIALIZATION = RowInitialization(seed=3, std=0.5)


class SearchSparseNN(test_model.TestSparseNN):  # type: ignore[misc]
    """TorchRec's test model in the search phase."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = mpe.SearchConfig(num_groups=4, temperature=1.0, initialization=_INITIALIZATION)
        mpe.prepare_search_(self, _counts(self), config)


class RetrainSparseNN(test_model.TestSparseNN):  # type: ignore[misc]
    """TorchRec's test model in the retrain phase, half of the rows at 1 bit, where values leave the code range."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        counts = _counts(self)
        mpe.prepare_retrain_(self, cut_precision(counts, self, 1, 0.5, initialization=_INITIALIZATION))


MODELS = {"plain": test_model.TestSparseNN, "search": SearchSparseNN, "retrain": RetrainSparseNN}


@contextmanager
def ours() -> Iterator[None]:
    """Within it TorchRec's tests make, find and shard our collections."""
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(test_model, "EmbeddingBagCollection", mpe.MPEEmbeddingBagCollection),
        mock.patch.object(test_model_parallel_base, "EmbeddingBagCollection", mpe.MPEEmbeddingBagCollection),
        mock.patch.object(test_model_parallel, "create_test_sharder", create_sharder),
        mock.patch.object(test_model_parallel_base, "create_test_sharder", create_sharder),
        mock.patch.object(test_model_parallel_base, "get_default_sharders", mpe.sharders),
        mock.patch.object(model_parallel, "get_default_sharders", mpe.sharders),
    ):
        yield


def on_rank(arguments: dict[str, Any]) -> int:
    """TorchRec's comparison of one sharded step with an unsharded one, in a group that exists; collections sharded."""
    assert arguments.pop("backend") == "gloo"
    assert arguments["local_size"] in (None, comm.get_local_size())
    torch.use_deterministic_algorithms(True)
    try:
        with ours():
            test_sharding.sharding_single_rank_test_single_process(
                pg=dist.GroupMember.WORLD, device=torch.device("cpu"), rank=dist.get_rank(), **arguments
            )
    finally:
        torch.use_deterministic_algorithms(False)
    return sum(sharder.collections for sharder in arguments["sharders"])


class OnOurRanks:
    """Runs what TorchRec's tests would start processes for on ranks that exist.

    Attributes:
        ranks (dict[int, Ranks]): by world size.
    """

    ranks: dict[int, Ranks]

    def _run_multi_process_test(self, *, callable: Callable[..., None], world_size: int = 2, **arguments: Any) -> None:
        assert callable is test_sharding.sharding_single_rank_test
        collections = 2 if arguments["weighted_tables"] else 1
        arguments["world_size"] = world_size
        assert self.ranks[world_size].run(on_rank, arguments) == [collections] * world_size


class Comparison(OnOurRanks, test_model_parallel.ModelParallelTestShared):  # type: ignore[misc]
    """TorchRec's comparison, for arguments of our choice."""

    def __init__(self, ranks: dict[int, Ranks]) -> None:
        super().__init__()
        self.ranks = ranks

    def run_with(self, **arguments: Any) -> None:
        self.setUp(backend="gloo")
        try:
            self._test_sharding(**arguments)
        finally:
            self.tearDown()
