"""TorchRec's own sharding tests pass with our collection and sharder."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig
from torchrec.distributed.planner import ParameterConstraints
from torchrec.modules.embedding_configs import PoolingType

from tests.distributed import torchrec_suite
from tests.distributed.equality import CW, DP, GRID, RW, TW, TWCW, TWRW
from tests.distributed.ranks import Ranks
from tests.distributed.torchrec_suite import MODELS, Sharder, create_sharder


@pytest.fixture(autouse=True)
def ours() -> Iterator[None]:
    with torchrec_suite.ours():
        yield


class OnFixtureRanks(torchrec_suite.OnOurRanks):
    @pytest.fixture(autouse=True)
    def _ranks(self, two_ranks: Ranks, four_ranks: Ranks) -> None:
        self.ranks = {2: two_ranks, 4: four_ranks}


class TestSharding(OnFixtureRanks, torchrec_suite.test_model_parallel._ModelParallelBase):  # type: ignore[misc]
    """Their tests of two ranks that do not ask for GPUs."""

    backend = "gloo"


class TestStateDict(torchrec_suite.test_model_parallel_base.ModelParallelStateDictBase):  # type: ignore[misc]
    backend = "gloo"


class TestSparseOnly(torchrec_suite.test_model_parallel_base.ModelParallelSparseOnlyBase):  # type: ignore[misc]
    backend = "gloo"


def sharder(kind: str, kernel: str, qcomms: QCommsConfig | None = None) -> Sharder:
    return create_sharder(
        "embedding_bag_collection", kind, kernel, qcomms_config=qcomms, device=torch.device("cpu")
    )  # fmt: skip


# Gloo cannot gather what TorchRec's backward of row-wise sharding does when batch sizes differ among ranks. TorchRec's
# generator of variable batches makes no per-sample weights. Mean pooling under grid sharding is refused.
VARIABLE = {"variable_batch_per_feature": True, "has_weighted_tables": False}
SHARDING = [
    # sharding type, kernel, ranks, and what else TorchRec's tests vary
    (TW, "fused", 2, {"variable_batch_size": True}),
    (TW, "fused_uvm_caching", 2, VARIABLE),
    (RW, "fused", 2, {"pooling": PoolingType.MEAN}),
    (RW, "fused_uvm", 4, {"indices_dtype": torch.int32}),
    (CW, "fused", 2, {**VARIABLE, "global_constant_batch": True}),
    (CW, "fused_uvm", 4, {"pooling": PoolingType.MEAN}),
    (DP, "dense", 2, {"variable_batch_size": True}),
    (TWRW, "fused", 4, {"pooling": PoolingType.MEAN}),
    (TWRW, "fused_uvm_caching", 4, {}),
    (TWCW, "fused", 4, {"variable_batch_size": True}),
    (GRID, "fused", 4, {}),
]


@pytest.mark.parametrize("phase", MODELS)
@pytest.mark.parametrize(("kind", "kernel", "world_size", "options"), SHARDING, ids=str)
def test_one_step_equals_the_unsharded_model(
    phase: str, kind: str, kernel: str, world_size: int, options: dict[str, Any], two_ranks: Ranks, four_ranks: Ranks
) -> None:
    names = [f"table_{k}" for k in range(6)] + [f"weighted_table_{k}" for k in range(2)]
    torchrec_suite.Comparison({2: two_ranks, 4: four_ranks}).run_with(
        sharders=[sharder(kind, kernel)],
        world_size=world_size,
        local_size=2,
        model_class=MODELS[phase],
        constraints={name: ParameterConstraints(sharding_types=[kind], min_partition=4) for name in names},
        **options,
    )


@pytest.mark.parametrize("phase", MODELS)
@pytest.mark.parametrize("kind", [TW, CW])
def test_quantized_communication(phase: str, kind: str, two_ranks: Ranks, four_ranks: Ranks) -> None:
    qcomms = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.BF16)
    torchrec_suite.Comparison({2: two_ranks, 4: four_ranks}).run_with(
        sharders=[sharder(kind, "fused", qcomms)], model_class=MODELS[phase], qcomms_config=qcomms
    )
