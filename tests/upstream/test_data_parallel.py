"""The DDP of a DistributedModelParallel comes off and on again."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from tests.upstream.sharded_tables import CPU, one_process
from torchrec_mpe.upstream.data_parallel import rewrap_data_parallel


def _wrapped(model: DistributedModelParallel) -> nn.Module:
    wrapped: nn.Module = model._dmp_wrapped_module
    return wrapped


def test_parameters_made_in_between_are_averaged() -> None:
    with one_process():
        model = DistributedModelParallel(nn.Sequential(nn.Linear(2, 2)), device=CPU, plan=ShardingPlan({}), sharders=[])
        old = _wrapped(model)
        assert isinstance(old, DistributedDataParallel)

        def change() -> None:
            assert _wrapped(model) is old.module
            model.module[0] = nn.Linear(2, 3)

        rewrap_data_parallel(model, change)
        new = _wrapped(model)
        assert isinstance(new, DistributedDataParallel) and new is not old
        assert model(torch.ones(1, 2)).shape == (1, 3)
        assert {id(p) for p in new.parameters()} == {id(p) for p in model.module[0].parameters()}


def test_after_an_error_it_is_as_before() -> None:
    with one_process():
        model = DistributedModelParallel(nn.Sequential(nn.Linear(2, 2)), device=CPU, plan=ShardingPlan({}), sharders=[])
        old = _wrapped(model)

        def fail() -> None:
            raise ValueError("no such plan")

        with pytest.raises(ValueError, match="no such plan"):
            rewrap_data_parallel(model, fail)
        assert _wrapped(model) is old
        model.init_data_parallel()  # does nothing if it is wrapped
        assert _wrapped(model) is old


def test_not_wrapped() -> None:
    with one_process():
        model = DistributedModelParallel(
            nn.Linear(2, 2), device=CPU, plan=ShardingPlan({}), sharders=[], init_data_parallel=False
        )
        rewrap_data_parallel(model, lambda: None)
        assert not isinstance(_wrapped(model), DistributedDataParallel)
