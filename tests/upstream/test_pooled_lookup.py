"""What we use of TorchRec's lookups and kernels is there, with the arguments that we pass."""

import inspect
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.cw_sharding import CwPooledEmbeddingSharding
from torchrec.distributed.sharding.twcw_sharding import TwCwPooledEmbeddingSharding

from tests.upstream.sharded_tables import CPU, KINDS, batch, collection, one_process, variable_batch
from torchrec_mpe.upstream.pooled_lookup import (
    OwnEmbeddingKernel,
    PooledLookup,
    configs_of_ranks,
    dense_rows_of_features,
    lookup_arguments,
    without_data_parallel,
)


def _sharding(env: Any, dims: dict[str, int] | None = None, **tables: str) -> Any:
    module, plan = collection(dims=dims, **tables)
    infos = ShardedEmbeddingBagCollection.create_grouped_sharding_infos(module, plan, "embedding_bags.", None)
    (of_kind,) = infos.values()
    return ShardedEmbeddingBagCollection.create_embedding_bag_sharding(of_kind, env, CPU, permute_embeddings=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharding_makes_its_lookup_of_these_arguments(kind: str) -> None:
    with one_process() as env:
        sharding = _sharding(env, t=kind)
        module = sys.modules[type(sharding).create_lookup.__module__]
        with mock.patch.object(module, "GroupedPooledEmbeddingsLookup") as made:
            sharding.create_lookup()
        made.assert_called_once_with(**lookup_arguments(sharding), feature_processor=None)
        assert [len(of_rank) for of_rank in configs_of_ranks(sharding)] == ([] if kind == "data_parallel" else [1])


def test_table_column_wise_is_column_wise() -> None:
    assert issubclass(TwCwPooledEmbeddingSharding, CwPooledEmbeddingSharding)
    assert TwCwPooledEmbeddingSharding.create_lookup is CwPooledEmbeddingSharding.create_lookup


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_create_embedding_kernel", ["config", "device", "pg", "sharding_type", "env"]),
        ("_forward", ["features_by_group"]),
        ("_forward_with_vbe_merging", ["features_by_group", "device"]),
        ("_apply_feature_processor_and_gradient_scaling", ["features", "config", "fs_auto_collection"]),
        ("prefetch", ["sparse_features", "forward_stream"]),
        ("forward", ["sparse_features"]),
    ],
)
def test_signatures(method: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(GroupedPooledEmbeddingsLookup, method)).parameters) == ["self", *parameters]


class _Watched(PooledLookup):
    """Notes which of its methods TorchRec calls."""

    def __init__(self, sharding: Any) -> None:
        self.calls: list[str] = []
        super().__init__(sharding)

    def create_kernel(self, *args: Any) -> Any:
        self.calls.append("create_kernel")
        return super().create_kernel(*args)

    def look_up(self, *args: Any) -> Any:
        self.calls.append("look_up")
        return super().look_up(*args)

    def writes_into_one_output(self, device: torch.device) -> bool:
        self.calls.append("writes_into_one_output")
        return super().writes_into_one_output(device)


# Two kernels: TBEs for CPU have rows of one width where these differ in the data type, here in the batch key.
def _two_kernels(env: Any) -> Any:
    module, plan = collection(a="table_wise", b="table_wise")
    infos = ShardedEmbeddingBagCollection.create_grouped_sharding_infos(module, plan, "embedding_bags.", None)
    for number, info in enumerate(infos["table_wise"]):
        info.fused_params = {**(info.fused_params or {}), "_batch_key": str(number)}
    return ShardedEmbeddingBagCollection.create_embedding_bag_sharding(infos["table_wise"], env, CPU)


def test_torchrec_calls_what_subclasses_override() -> None:
    with one_process() as env:
        lookup = _Watched(_two_kernels(env))
        assert lookup.calls == ["create_kernel"] * 2 and len(lookup.kernels) == 2
        features = batch("f_a", "f_b")
        pooled = lookup(features)
        assert lookup.calls[2:] == ["look_up"] * 2
        # TorchRec's own loop over the kernels gives the same.
        groups = [part for _, part in lookup.kernels_and_features(features)]
        torch.testing.assert_close(torch.cat(GroupedPooledEmbeddingsLookup._forward(lookup, groups), 1), pooled)
        seen: list[Any] = []
        lookup.register_optim_state_tracker_fn(lambda *args: seen.append(args))
        lookup(features)
        assert [kernel for *_, kernel in seen] == lookup.kernels
        assert lookup.gradient_factor == 1  # world size 1


def test_variable_batches_of_two_kernels_on_cpu() -> None:
    """Rank after rank: here one rank's features one after the other, flat."""
    with one_process() as env:
        lookup = _Watched(_two_kernels(env))
        merged = lookup(variable_batch(f_a=[[1, 2], [3]], f_b=[[4]]))
        assert "writes_into_one_output" in lookup.calls
        a, b = (kernel.split_embedding_weights()[0] for kernel in lookup.kernels)
        torch.testing.assert_close(merged, torch.cat([a[1] + a[2], a[3], b[4]]))


def test_dense_rows() -> None:
    with one_process() as env:
        dense = PooledLookup(_sharding(env, {"b": 8}, a="data_parallel", b="data_parallel"))
        (kernel,) = dense.kernels
        rows = dense_rows_of_features(kernel)
        assert rows is not None and [tuple(of_table.shape) for of_table in rows] == [(8, 4), (8, 8)]
        for found, weights in zip(rows, kernel.split_embedding_weights(), strict=True):
            assert found.requires_grad and torch.equal(found, weights)
        (fused,) = PooledLookup(_sharding(env, a="table_wise")).kernels
        assert dense_rows_of_features(fused) is None
        wrapped = DistributedDataParallel(dense)
        assert without_data_parallel(wrapped) is dense and without_data_parallel(dense) is dense


class _Kernel(OwnEmbeddingKernel):
    """One without a TBE."""

    @property
    def emb_module(self) -> Any:
        raise AssertionError


def test_a_kernel_of_ones_own() -> None:
    with one_process() as env:
        (config,) = lookup_arguments(_sharding(env, a="table_wise", b="table_wise"))["grouped_configs"]
        kernel = _Kernel(config, device=CPU)
        assert kernel.feature_table_map == [0, 1] and kernel.pooling_mode.name == "SUM"
        features = batch("f_a", "f_b")
        ids, offsets = kernel.ids_and_offsets(features)
        assert torch.equal(ids, features.values()) and torch.equal(offsets, features.offsets())
