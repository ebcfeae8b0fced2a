"""What we use of TorchRec's ShardedEmbeddingBagCollection is there and does what we need."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardingEnv

from tests.upstream.sharded_tables import CPU, KINDS, batch, collection, one_process
from torchrec_mpe.upstream.pooled_lookup import PooledLookup
from torchrec_mpe.upstream.sharded_embeddingbag import OpenShardedEmbeddingBagCollection


class _Watched(OpenShardedEmbeddingBagCollection):
    """Notes which of its methods TorchRec calls."""

    def __init__(self, *args: Any) -> None:
        self.calls: list[str] = []
        super().__init__(*args)

    def create_lookup(self, sharding_type: str, sharding: Any) -> PooledLookup:
        self.calls.append(sharding_type)
        return super().create_lookup(sharding_type, sharding)

    def prepare_state_dict(self) -> None:
        self.calls.append("prepare_state_dict")
        assert self.embedding_bags is not None

    def take_from_state_dict(self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]) -> None:
        self.calls.append("take_from_state_dict")
        assert isinstance(state_dict.pop(f"{prefix}ours"), Tensor) and missing_keys == []


@pytest.fixture
def env() -> Iterator[ShardingEnv]:
    with one_process() as found:
        yield found


def _sharded(env: ShardingEnv, means: tuple[str, ...] = (), **tables: str) -> tuple[nn.Module, _Watched]:
    """An unsharded collection and a sharded one with its rows."""
    module, plan = collection(means, **tables)
    sharded = _Watched(module, plan, env, {}, CPU)
    ours = {"ours": torch.zeros(1)}
    sharded.load_state_dict({**module.state_dict(), **ours})
    return module, sharded


def test_torchrec_calls_what_subclasses_override(env: ShardingEnv) -> None:
    module, sharded = _sharded(env, a="table_wise", b="row_wise")
    assert sharded.calls == ["table_wise", "row_wise", "prepare_state_dict", "take_from_state_dict"]
    assert all(type(lookup) is PooledLookup for lookup in sharded.lookups()) and len(sharded.lookups()) == 2
    for name, rows in module.state_dict().items():
        assert torch.equal(sharded.state_dict()[name].local_shards()[0].tensor, rows)


def test_what_it_says_of_itself(env: ShardingEnv) -> None:
    module, sharded = _sharded(env, a="table_wise", b="data_parallel")
    assert sharded.process_group is env.process_group and sharded.device == CPU and not sharded.is_weighted()
    assert sharded.embedding_bag_configs() == module.embedding_bag_configs()  # type: ignore[operator]
    assert sharded.config_of("b").num_embeddings == 8
    ((kind, groups),) = sharded.kernel_configs()  # of the model-parallel
    assert kind == "table_wise" and [[table.name for table in g.embedding_tables] for g in groups[0]] == [["a"]]


@pytest.mark.parametrize("seen", ["no batch", "a batch", "a batch of another order"])
def test_forward_without_trace(seen: str, env: ShardingEnv) -> None:
    module, sharded = _sharded(env, ("t1",), **{f"t{k}": kind for k, kind in enumerate(KINDS)})
    names = [f"f_t{k}" for k in range(len(KINDS))]
    features = batch(*names, "f_other")
    if seen != "no batch":
        sharded(batch(*(names if seen == "a batch" else reversed(names)))).wait()
    before = _trace(sharded)
    found = sharded.forward_without_trace(features).to_dict()
    want = module(features).to_dict()
    assert found.keys() == want.keys()
    for name, values in want.items():
        torch.testing.assert_close(found[name], values)
    assert before == _trace(sharded)


def _trace(sharded: _Watched) -> list[Any]:
    tbes = [kernel.emb_module for lookup in sharded.lookups() for kernel in lookup.kernels]
    counted = [(int(tbe.iter), int(tbe.iter_cpu), tbe.step) for tbe in tbes if hasattr(tbe, "iter")]
    assert counted
    return [sharded._has_uninitialized_input_dist, list(sharded._features_order), len(sharded._input_dists), *counted]


def test_only_means_over_several_ranks_are_divided(env: ShardingEnv) -> None:
    tables = {"a": "row_wise", "b": "row_wise", "c": "table_wise", "d": "table_row_wise", "e": "column_wise"}
    module, sharded = _sharded(env, ("a", "c", "d", "e"), **tables)
    features = batch(*(f"f_{name}" for name in tables))
    found = sharded(features).wait().to_dict()
    for name, values in module(features).to_dict().items():
        torch.testing.assert_close(found[name], values)


def test_some_tables_are_reset(env: ShardingEnv) -> None:
    _, sharded = _sharded(env, a="table_wise", b="table_wise")
    weights = {name: sharded.embedding_bags[name].weight for name in "ab"}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    sharded.reset_tables({"b"})
    assert torch.equal(weights["a"], before["a"]) and not torch.equal(weights["b"], before["b"])
    assert [config.name for config in sharded.embedding_bag_configs()] == ["a", "b"]
