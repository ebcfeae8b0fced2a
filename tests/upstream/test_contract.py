"""What upstream/ relies on, name by name: a release of torch, TorchRec, FBGEMM, polars or torchx without it fails here.

Names of the other packages are told apart from behaviour: the first tests say which name or parameter is gone, the last
ones what a name no longer does.
"""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import Shard as PlannedShard
from torchrec.distributed.planner.types import ShardingOption, Topology
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.upstream import checkpoint, export, feature_processed, process_group, sharded_tensor, tensors
from torchrec_mpe.upstream.embedding_bag_collection import set_device, tables_of_sharded
from torchrec_mpe.upstream.fused_optimizers import DEFAULT_OPTIMIZER, FUSED_OPTIMIZERS, traits_of
from torchrec_mpe.upstream.modules import (
    ChecksItsState,
    ConvertsItself,
    buffers_of,
    replace_buffers,
    running_statistics,
)
from torchrec_mpe.upstream.optimizers import (
    optimizer_in_backward,
    optimizer_inside,
    tbe_of,
    without_optimizers_in_backward_,
)
from torchrec_mpe.upstream.planner import (
    EmbeddingPerfEstimator,
    EmbeddingStorageEstimator,
    SearchingPlanner,
    device_memory_bandwidth,
    reserved_share,
    without_optimizer_state,
)
from torchrec_mpe.upstream.polars import codes_of, new_categories
from torchrec_mpe.upstream.tbe import (
    buffers_as_one_table,
    copy_progress,
    lies_like_one_table,
    per_row_counter,
    set_steps,
)
from torchrec_mpe.upstream.torchx import file_contents

# Names by what holds them, and for functions the parameters that are passed by name, or how many by position.
NAMES: dict[str, tuple[str | int, ...]] = {
    "polars:Categories.random": (),
    "polars:Series.to_physical": (),
    "torch:_assert_async": (),
    "torch:_foreach_add_": (),
    "torch._C._distributed_c10d:HashStore": (),
    "torch._C._distributed_c10d:Store.check": (),
    "torch._C._distributed_c10d:Store.wait": (),
    "torch._dynamo.exc:UserError": (),
    "torch._inductor:aoti_compile_and_package": ("package_path", "inductor_configs"),
    "torch._inductor:aoti_load_package": (1,),
    "torch._ops:OpOverload.namespace": (),
    "torch.distributed._shard.metadata:ShardMetadata": (3,),
    "torch.distributed._shard.sharded_tensor:init_from_local_shards": (2, "process_group"),
    "torch.distributed._shard.sharded_tensor.api:ShardedTensor._init_from_local_shards_and_global_metadata": (
        1,
        "sharded_tensor_metadata",
        "process_group",
    ),
    "torch.distributed._shard.sharded_tensor.metadata:ShardedTensorMetadata": (3,),
    "torch.distributed._shard.sharded_tensor.metadata:TensorProperties": ("dtype",),
    "torch.distributed._shard.sharded_tensor.shard:Shard": (2,),
    "torch.distributed.checkpoint.api:CheckpointException.failures": (),
    "torch.distributed.checkpoint.filesystem:FileSystemReader.read_metadata": (),
    "torch.distributed.checkpoint.filesystem:FileSystemWriter": (1,),
    "torch.distributed.checkpoint.metadata:TensorStorageMetadata": ("properties", "size"),
    "torch.distributed.checkpoint.state_dict_loader:load": (1, "storage_reader", "process_group", "no_dist"),
    "torch.distributed.checkpoint.state_dict_saver:AsyncSaveResponse": ("upload_completion",),
    "torch.distributed.checkpoint.state_dict_saver:async_save": (1, "storage_writer", "process_group"),
    "torch.distributed.checkpoint.state_dict_saver:save": (1, "storage_writer", "process_group"),
    "torch.distributed.distributed_c10d:_get_default_store": (),
    "torch.fx.experimental._config:backed_size_oblivious": (),
    "torch.nn.modules.batchnorm:_BatchNorm": (),
    "torch.nn:Module._apply": (2, "recurse"),
    "torch.nn:Module._load_from_state_dict": (8,),
    "torch.utils._pytree:tree_map": (2, "is_leaf"),
    "torchrec.distributed.planner.constants:DDR_MEM_BW": (),
    "torchrec.distributed.planner.constants:MIN_CW_DIM": (),
    "torchrec.distributed.planner.constants:kernel_bw_lookup": (5,),
    "torchrec.distributed.planner.shard_estimators:EmbeddingPerfEstimator": (2,),
    "torchrec.distributed.planner.shard_estimators:EmbeddingPerfEstimator.estimate": (3,),
    "torchrec.distributed.planner.shard_estimators:EmbeddingStorageEstimator": (3, "run_embedding_at_peak_memory"),
    "torchrec.distributed.planner.shard_estimators:EmbeddingStorageEstimator.estimate": (3,),
    "torchrec.distributed.planner.shard_estimators:get_num_poolings": (2,),
    "torchrec.distributed.utils:optimizer_type_to_emb_opt_type": (1,),
    "torchx.util.io:_get_file_contents": (1,),
    "fbgemm_gpu.split_table_batched_embeddings_ops_training:SplitTableBatchedEmbeddingBagsCodegen.set_optimizer_step": (
        2,
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there_and_takes_what_it_is_given(name: str) -> None:
    module, _, path = name.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        assert hasattr(found, part) or part in getattr(found, "__annotations__", {}), f"{name} is gone"
        found = getattr(found, part, None)
    wanted = NAMES[name]
    if not wanted:
        return
    parameters = inspect.signature(found).parameters
    for given in wanted:
        if isinstance(given, str):
            assert given in parameters, f"{name} takes no {given} any more, but {list(parameters)}"
        else:
            kinds = [p.kind for p in parameters.values()]
            places = sum(
                kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds
            )
            assert places >= given or inspect.Parameter.VAR_POSITIONAL in kinds, (
                f"{name} takes fewer than {given} arguments by position, but {list(parameters)}"
            )


def _tbe(optimizer: EmbOptimType = EmbOptimType.EXACT_ADAGRAD) -> SplitTableBatchedEmbeddingBagsCodegen:
    place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
    return SplitTableBatchedEmbeddingBagsCodegen([(3, 4, *place), (2, 4, *place)], optimizer=optimizer)


@pytest.mark.parametrize(
    "field",
    [
        "_buffers",
        "weights_physical_offsets",
        "weights_placements",
        "weights_offsets",
        "momentum1_physical_offsets",
        "momentum1_offsets",
        "momentum1_placements",
        "D_offsets",
        "hash_size_cumsum",
        "rows_per_table",
        "feature_dims",
        "embedding_specs",
        "feature_table_map",
        "dims",
        "total_D",
        "max_D",
        "pooling_mode",
        "is_nobag",
        "bounds_check_mode_int",
        "step",
        "iter",
        "learning_rate_tensor",
        "use_cpu",
    ],
)
def test_a_tbe_has_the_field(field: str) -> None:
    assert hasattr(_tbe(), field), f"SplitTableBatchedEmbeddingBagsCodegen.{field} is gone"


def _planner() -> SearchingPlanner:
    return SearchingPlanner(topology=Topology(world_size=1, compute_device="cpu"), batch_size=2)


@pytest.mark.parametrize(
    "field",
    [
        "_topology",
        "_batch_size",
        "_partitioner",
        "_storage_reservation",
        "_best_plan",
        "_proposers",
        "_enumerator",
        "_constraints",
    ],
)
def test_a_planner_has_the_field(field: str) -> None:
    assert field in vars(_planner()), f"EmbeddingShardingPlanner.{field} is gone"


@pytest.mark.parametrize("kind", [EmbeddingPerfEstimator, EmbeddingStorageEstimator])
def test_an_estimator_takes_a_topology_and_constraints(kind: type) -> None:
    assert kind(Topology(world_size=1, compute_device="cpu"), {}) is not None


def test_a_reservation_has_its_share_and_what_it_left() -> None:
    reservation = FixedPercentageStorageReservation(0.25)
    assert reserved_share(reservation) == 0.25, "FixedPercentageStorageReservation._percentage is gone"
    topology = Topology(world_size=1, compute_device="cpu")
    left = reservation.reserve(topology, 2, nn.Linear(1, 1), [], {})
    left.devices[0].storage.ddr = 7
    last = reservation.last_reserved_topology
    assert last is not None and last.devices[0].storage.ddr == 7, "the reserved topology is no longer the one returned"


def test_the_bandwidth_of_fused_kernels_is_known() -> None:
    topology = Topology(world_size=1, compute_device="cpu")
    assert device_memory_bandwidth(topology) == topology.ddr_mem_bw, "kernel_bw_lookup has another order of arguments"


def test_an_option_gives_its_tensor_away_and_back() -> None:
    weight = torch.zeros(4, 4)
    option = ShardingOption(
        "t", weight, ("c", nn.Linear(1, 1)), [1.0], 2, "table_wise", "host", "fused", [PlannedShard([4, 4], [0, 0])]
    )
    with without_optimizer_state(option):
        assert option.tensor.is_meta, "ShardingOption.tensor is no longer what _tensor is"
    assert option.tensor is weight


@pytest.mark.parametrize("optimizer", FUSED_OPTIMIZERS, ids=lambda optimizer: optimizer.value)
def test_the_table_of_optimizers_says_what_a_tbe_has(optimizer: EmbOptimType) -> None:
    traits = traits_of(optimizer)
    try:
        tbe = _tbe(optimizer)
    except AssertionError as error:
        pytest.skip(f"not on CPU: {error}")
    states = [] if optimizer in (EmbOptimType.NONE, EmbOptimType.EXACT_SGD) else tbe.split_optimizer_states()[0]
    elements = [state.numel() // 3 for state in states]
    assert elements == traits.state_elements(4), f"a row of {optimizer} has states of {elements} elements"
    if traits.one_table:
        assert lies_like_one_table(tbe, traits.state_elements(4)), (
            f"tables of {optimizer} do not lie one after the other"
        )
    assert per_row_counter(tbe, 5) is None


def test_the_default_optimizer_is_fbgemms() -> None:
    parameters = inspect.signature(SplitTableBatchedEmbeddingBagsCodegen).parameters
    assert parameters["optimizer"].default == DEFAULT_OPTIMIZER


def test_a_tbe_counts_on_from_where_it_is_set() -> None:
    tbe, other = _tbe(EmbOptimType.EXACT_ROWWISE_ADAGRAD), _tbe(EmbOptimType.EXACT_ROWWISE_ADAGRAD)
    set_steps(tbe, 7)
    tbe.set_learning_rate(0.5)
    copy_progress(tbe, other)
    other(torch.tensor([1]), torch.tensor([0, 1, 1])).sum().backward()
    assert (int(other.iter), other.get_learning_rate()) == (8, 0.5)


def test_buffers_as_one_table_replace_buffers_that_a_tbe_has() -> None:
    tbe = _tbe()
    changed = buffers_as_one_table(tbe, has_state=True)
    assert changed.keys() == buffers_of(tbe).keys(), "a buffer of the TBE has another name"
    assert changed["rows_per_table"].tolist() == [5]


def _fused_bag() -> BatchedFusedEmbeddingBag:
    shared = {
        "data_type": DataType.FP32,
        "pooling": PoolingType.SUM,
        "is_weighted": False,
        "has_feature_processor": False,
        "compute_kernel": EmbeddingComputeKernel.FUSED,
    }
    place = sharded_tensor.ShardMetadata([0, 0], [4, 4], "rank:0/cpu")
    table = ShardedEmbeddingTable(
        num_embeddings=4,
        embedding_dim=4,
        name="t",
        embedding_names=["f"],
        feature_names=["f"],
        local_rows=4,
        local_cols=4,
        local_metadata=place,
        global_metadata=sharded_tensor.ShardedTensorMetadata(
            [place], torch.Size((4, 4)), sharded_tensor.TensorProperties(dtype=torch.float32)
        ),
        **shared,
    )
    return BatchedFusedEmbeddingBag(
        GroupedEmbeddingConfig(embedding_tables=[table], fused_params={}, **shared),
        pg=dist.GroupMember.WORLD,
        device=torch.device("cpu"),
    )


def test_optimizers_give_away_what_they_wrap(one_rank: None) -> None:
    bag = _fused_bag()
    assert tbe_of(bag.fused_optimizer) is bag.emb_module, "EmbeddingFusedOptimizer._emb_module is gone"
    weight = nn.Parameter(torch.zeros(2))
    wrapper = KeyedOptimizerWrapper({"w": weight}, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    assert isinstance(optimizer_inside(wrapper), torch.optim.SGD), "KeyedOptimizerWrapper._optimizer is gone"


def test_an_optimizer_in_backward_is_noted_on_the_weight() -> None:
    weight = nn.Parameter(torch.zeros(2, 4))
    assert optimizer_in_backward(weight) is None
    apply_optimizer_in_backward(torch.optim.SGD, [weight], {"lr": 0.1})
    assert optimizer_in_backward(weight) == EmbOptimType.EXACT_SGD, "_optimizer_classes is gone"


class _Doubles(ConvertsItself):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("held", torch.ones(2))

    def convert(self, convert: Any, recurse: bool) -> None:
        super().convert(convert, recurse)
        self.get_buffer("held").mul_(2)


def test_a_module_that_converts_itself_is_asked() -> None:
    doubled = nn.Sequential(_Doubles()).to(torch.float64)[0]
    assert doubled.held.dtype == torch.float64 and doubled.held.tolist() == [2, 2], "Module.to no longer calls _apply"


class _Refuses(ChecksItsState):
    def __init__(self, why: str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.why = why

    def refusal(self, state_dict: Any, prefix: str) -> str | None:
        assert f"{prefix}weight" in state_dict
        return self.why


def test_a_module_that_refuses_a_state_loads_nothing_of_it() -> None:
    state = {"0.weight": torch.ones(2)}
    taking = nn.Sequential(_Refuses(None))
    taking.load_state_dict(state)
    assert taking[0].weight.tolist() == [1, 1]
    refusing = nn.Sequential(_Refuses("of another plan"))
    with pytest.raises(RuntimeError, match="of another plan"):
        refusing.load_state_dict(state)
    assert refusing[0].weight.tolist() == [0, 0], "Module.load_state_dict no longer calls _load_from_state_dict"


def test_buffers_and_running_statistics_of_modules() -> None:
    norm = nn.BatchNorm1d(2)
    assert {id(t) for t in running_statistics(norm)} == {id(norm.running_mean), id(norm.running_var)}
    assert running_statistics(nn.BatchNorm1d(2, track_running_stats=False)) == running_statistics(nn.Linear(1, 1)) == []
    assert buffers_of(norm).keys() == dict(norm.named_buffers()).keys(), "Module._buffers is gone"
    replace_buffers(norm, {"running_mean": torch.ones(2)})
    assert [name for name, _ in norm.named_buffers()] == ["running_mean"]


def test_tensors_tell_their_changes_and_are_added_and_asserted() -> None:
    tensor = torch.zeros(2)
    before = tensors.changes_in_place(tensor)
    tensors.add_each_([tensor], [torch.ones(2)])
    assert tensor.tolist() == [1, 1] and tensors.changes_in_place(tensor) == before + 1, "Tensor._version is gone"
    tensors.assert_on_device(torch.tensor(True), "never")
    with pytest.raises(RuntimeError, match="an id is bad"):
        tensors.assert_on_device(torch.tensor(False), "an id is bad")
    doubled = tensors.map_nested(lambda x: x * 2, (1, {"a": [2]}), lambda x: isinstance(x, int))
    assert doubled == (2, {"a": [4]})


def test_categories_number_texts_by_first_appearance_without_gaps() -> None:
    kind = new_categories()
    first = pl.Series(["b", "a", "b"]).cast(kind)
    second = pl.Series(["c", "a"]).cast(kind)
    assert codes_of(first).tolist() == [0, 1, 0] and codes_of(second).tolist() == [2, 1]


def test_torchx_finds_a_file(tmp_path: Path) -> None:
    (tmp_path / "component.py").write_text("text")
    assert file_contents(str(tmp_path / "component.py")) == "text"
    assert file_contents(str(tmp_path / "none.py")) is None


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=process_group.store_in_memory(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_store_of_all_ranks(one_rank: None) -> None:
    store = process_group.store_of_all_ranks()
    store.set("key", "value")
    assert store.check(["key"]) and store.get("key") == b"value"


def test_collections_say_their_device_and_tables(one_rank: None) -> None:
    table = EmbeddingBagConfig(name="t", num_embeddings=4, embedding_dim=4, feature_names=["f"])
    collection = EmbeddingBagCollection([table], device=torch.device("meta"))
    set_device(collection, torch.device("cpu"))
    assert collection.device == torch.device("cpu"), "EmbeddingBagCollection._device is gone"
    model = DistributedModelParallel(
        EmbeddingBagCollection([table]), device=torch.device("cpu"), sharders=[EmbeddingBagCollectionSharder()]
    )
    assert [t.name for t in tables_of_sharded(model.module)] == ["t"]


def test_sharded_tensors_are_made_of_local_shards(one_rank: None) -> None:
    place = sharded_tensor.ShardMetadata([0, 0], [2, 3], "rank:0/cpu")
    metadata = sharded_tensor.ShardedTensorMetadata(
        [place], torch.Size((2, 3)), sharded_tensor.TensorProperties(dtype=torch.float32)
    )
    first = sharded_tensor.from_local_shards([sharded_tensor.Shard(torch.ones(2, 3), place)], metadata, None)
    second = sharded_tensor.like_shards_of(first, [sharded_tensor.Shard(torch.zeros(2, 3), place)])
    assert second.metadata().size == first.metadata().size and second.local_shards()[0].tensor.sum() == 0
    gathered = sharded_tensor.gather_places([sharded_tensor.Shard(torch.ones(2, 3), place)], 2, 3, group=None)
    assert tuple(gathered.metadata().size) == (2, 3)


@pytest.mark.parametrize("save", [checkpoint.save, checkpoint.save_in_thread])
def test_tensors_are_saved_and_loaded(one_rank: None, tmp_path: Path, save: Any) -> None:
    group = dist.new_group(backend="gloo")
    save({"b": torch.ones(2, 3), "a": torch.ones(2, dtype=torch.int64)}, tmp_path, group).result()
    assert (tmp_path / checkpoint.INDEX_FILE).is_file()
    saved = checkpoint.saved_tensors(tmp_path)
    assert saved["b"] == checkpoint.SavedTensor((2, 3), torch.float32) and saved["a"].dtype == torch.int64
    loaded: dict[str, Tensor] = {"b": torch.zeros(2, 3)}
    checkpoint.load(loaded, tmp_path, group)
    assert loaded["b"].sum() == 6


def test_what_cannot_be_loaded_is_told_in_one_line(one_rank: None, tmp_path: Path) -> None:
    checkpoint.save({"a": torch.ones(2)}, tmp_path, None).result()
    alone = {"a": torch.zeros(2)}
    checkpoint.load_alone(alone, tmp_path)
    assert alone["a"].sum() == 2
    for file in tmp_path.glob("*.distcp"):
        file.write_bytes(b"")
    with pytest.raises(checkpoint.LoadError):
        checkpoint.load_alone(alone, tmp_path)
    with pytest.raises(checkpoint.FAILURES) as raised:
        checkpoint.load(alone, tmp_path, None)
    assert checkpoint.reason(raised.value).endswith("(on rank 0)") and "\n" not in checkpoint.reason(raised.value)


def test_programs_for_any_batch_and_what_they_hold() -> None:
    linear = nn.Linear(2, 1)
    batch = torch.export.Dim("batch", min=0)
    with export.for_any_batch():
        program = export.trace(linear, (torch.ones(3, 2),), ({0: batch},))
    assert export.operator_namespaces(program) == {"aten"}
    moved = export.with_state(program, lambda t: nn.Parameter(t.to("meta"), requires_grad=False))
    assert all(t.is_meta for t in moved.state_dict.values()), "ExportedProgram.state_dict is no longer _state_dict"
    assert not any(t.is_meta for t in program.state_dict.values())
    with pytest.raises(export.CannotTraceError):
        export.trace(linear, (torch.ones(3, 2),), ({1: torch.export.Dim("columns")},))


def test_feature_processed_collections(one_rank: None) -> None:
    config = EmbeddingBagConfig(name="t", num_embeddings=8, embedding_dim=4, feature_names=["f"])
    ebc = EmbeddingBagCollection([config], is_weighted=True)
    module = FeatureProcessedEmbeddingBagCollection(ebc, PositionWeightedModuleCollection({"f": 3}))
    assert feature_processed.collection_inside(module) is ebc, "_embedding_bag_collection has another name"
    sharders: list[Any] = [feature_processed.FeatureProcessedSharder([EmbeddingBagCollectionSharder()])]
    dmp = DistributedModelParallel(module, device=torch.device("cpu"), sharders=sharders)
    sharded: Any = dmp.module
    assert isinstance(sharded, feature_processed.OpenShardedFeatureProcessedEmbeddingBagCollection)
    assert isinstance(sharded._no_op_zero, torch.Tensor) and sharded._feature_processors is not None
    features = KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([1, 2]), torch.tensor([1, 1]))
    assert dmp(features).wait()._values.shape == (2, 4), "KeyedTensor._values has another name"
    whole = feature_processed.unsharded_around(sharded, ebc)
    assert whole._feature_processors._pre_processed is False, "_pre_processed has another name"
    torch.testing.assert_close(whole(features)["f"].shape, torch.Size([2, 4]))


def test_marks_of_an_optimizer_in_backward() -> None:
    layer = nn.Linear(2, 2)
    with pytest.warns(DeprecationWarning):
        apply_optimizer_in_backward(torch.optim.SGD, layer.parameters(), {"lr": 1.0})
    before = layer.weight.detach().clone()
    without_optimizers_in_backward_(layer)
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None and torch.equal(layer.weight, before), "_in_backward_optimizers is gone"
