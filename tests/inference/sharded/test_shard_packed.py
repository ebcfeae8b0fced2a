"""shard_packed: where tables go, in how many bytes, and that wrong values are found out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.planner.types import PlannerError
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.inference.sharded.random_collections import batch, collection, cut, expected
from tests.packing.random_codings import coded_collection
from torchrec_mpe.distributed.planner.packed_placement import PackedPlacement, place_packed
from torchrec_mpe.inference.sharded import row_ranges
from torchrec_mpe.inference.sharded.replicas import ReplicatedModel
from torchrec_mpe.inference.sharded.sharded_collection import ShardedPackedEmbeddingBagCollection
from torchrec_mpe.inference.sharded.verify import verify_sharded
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables

CPU = torch.device("cpu")


class Model(nn.Module):
    """Two dense layers over a collection."""

    def __init__(self, ebc: nn.Module) -> None:
        super().__init__()
        self.sparse = nn.ModuleDict({"ebc": ebc})
        self.over = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.over(self.sparse["ebc"](features).values())


def planned(directory: str = "auto") -> tuple[mpe.PackedEmbeddingBagCollection, mpe.PrecisionPlan]:
    """Tables of 30,000, 20,000 and 500 rows, the second one's ids no ranks, and the plan that they are packed by."""
    g = torch.Generator().manual_seed(0)
    widths = {
        name: TableBitWidths(
            rows,
            16,
            (0, rows // 10, rows // 2, rows),
            (6, 2, 0),
            torch.randperm(rows, generator=g).int() if name == "b" else None,
        )
        for name, rows in (("a", 30_000), ("b", 20_000), ("c", 500))
    }
    alpha = torch.tensor([0.0, *[0.1] * 8])

    def table(name: str) -> TableToPack:
        weight = torch.randn(widths[name].num_embeddings, 16, generator=g)
        chosen = directory if name == "b" else "auto"
        return TableToPack(name, widths[name], lambda a, b: weight[a:b], alpha, torch.zeros(16), torch.ones(16), chosen)

    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=w.num_embeddings, embedding_dim=16, feature_names=[f"f_{name}"])
        for name, w in widths.items()
    ]
    packed = pack_tables([table(name) for name in widths])
    return mpe.PackedEmbeddingBagCollection(configs, packed), mpe.PrecisionPlan(widths, tuple(range(9)))


@pytest.mark.parametrize("part", [0.9, 0.6, 0.4])
def test_the_bytes_of_the_plan(part: float) -> None:
    """Chosen from the tables themselves what the planner chooses from the precision plan; bytes exact."""
    ebc, plan = planned()
    memory = int(plan.size_report().total * part)
    sharded, placement = mpe.shard_packed(ebc, ["cpu"] * 4, memory=memory)
    assert isinstance(sharded, ShardedPackedEmbeddingBagCollection)
    assert placement == place_packed(plan, memory, 4)
    assert tuple(sharded.device_bytes.values()) == placement.device_bytes
    assert max(placement.device_bytes) <= memory
    ids = torch.tensor([0, 29_999, 3, 19_999, 0, 499])
    kjt = KeyedJaggedTensor.from_lengths_sync(["f_a", "f_b", "f_c"], ids, torch.full((3,), 2))
    torch.testing.assert_close(sharded(kjt).values(), ebc(kjt).values(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("part", [0.7, 0.4])
@pytest.mark.parametrize("remap", [False, True])
def test_coded_tables_take_the_bytes_of_the_placement(remap: bool, part: float) -> None:
    packed, dense = coded_collection(3, [16, 16, 64], [16, 2, 8], rows=3000, remap=remap)
    configs = [
        EmbeddingBagConfig(name=f"t{k}", num_embeddings=3000, embedding_dim=dim, feature_names=[f"f{k}"])
        for k, dim in enumerate((16, 16, 64))
    ]
    ebc = mpe.PackedEmbeddingBagCollection(configs, packed)
    memory = int(ebc.size_report().total * part)
    sharded, placement = mpe.shard_packed(ebc, ["cpu"] * 6, memory=memory)
    assert isinstance(sharded, ShardedPackedEmbeddingBagCollection)
    assert tuple(sharded.device_bytes.values()) == placement.device_bytes
    assert max(placement.device_bytes) <= memory and placement.num_devices > 1
    ids = torch.arange(0, 3000, 17).repeat(3)
    kjt = KeyedJaggedTensor.from_lengths_sync(["f0", "f1", "f2"], ids, torch.ones(len(ids), dtype=torch.int64))
    want = torch.cat([rows[:3000:17] for rows in dense], dim=1)
    torch.testing.assert_close(sharded(kjt).values().double(), want, rtol=1e-5, atol=1e-5)


def test_directories_that_were_asked_for_never_overfill_a_device() -> None:
    ebc, plan = planned("remap")  # 80,000 bytes of directory that the plan does not have
    total = ebc.size_report().total
    assert total > plan.size_report().total + 60_000
    sharded, placement = mpe.shard_packed(ebc, ["cpu"] * 4, memory=total - 1)
    assert isinstance(sharded, ShardedPackedEmbeddingBagCollection)
    assert max(sharded.device_bytes.values()) <= total - 1 and not placement.replicate


def test_a_placement_of_the_planner() -> None:
    ebc, plan = planned()
    placement = place_packed(plan, plan.size_report().total // 2, 3)
    sharded, chosen = mpe.shard_packed(ebc, ["cpu"] * 3, placement=placement)
    assert chosen is placement and tuple(sharded.device_bytes.values()) == placement.device_bytes
    with pytest.raises(ValueError, match=r"table \w: it is placed on device \d of 1"):
        mpe.shard_packed(ebc, ["cpu"], placement=placement)


@pytest.mark.supports("shard_packed: replicas", "CPU")
def test_a_model_that_fits_is_replicated_and_requests_take_turns() -> None:
    ebc, dense = collection(3)
    model = Model(ebc).eval()
    kjt = batch(dense, 4)
    want = model(kjt)
    replicated, placement = mpe.shard_packed(model, ["cpu", "cpu"])
    assert isinstance(replicated, ReplicatedModel) and placement.replicate
    asked: list[int] = []
    for k, replica in enumerate(replicated.replicas):
        replica.register_forward_hook(lambda *_, k=k: asked.append(k))
    for replica in (None, None, None, 0):
        assert torch.equal(replicated(kjt, replica=replica), want)
    assert asked == [0, 1, 0, 0]
    assert replicated.replicas[0].over[1].weight.data_ptr() != model.over[1].weight.data_ptr()
    alone, _ = mpe.shard_packed(model, ["cpu"])
    assert isinstance(alone, Model) and torch.equal(alone(kjt), want)


def test_a_model_is_copied_and_its_tables_are_split() -> None:
    ebc, dense = collection(3)
    model = Model(ebc).train()
    kjt = batch(dense, 4)
    want = model(kjt)
    total = ebc.size_report().total
    sharded, placement = mpe.shard_packed(model, ["cpu"] * 3, memory=total * 2 // 3)
    assert placement.num_devices > 1 and not sharded.training
    assert model.sparse["ebc"] is ebc and isinstance(sharded.sparse["ebc"], ShardedPackedEmbeddingBagCollection)
    torch.testing.assert_close(sharded(kjt), want, rtol=1e-5, atol=1e-5)


def test_wrong_values_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ebc, dense = collection(4)
    honest = row_ranges.locate_consecutive

    def off_by_one(*arguments: object) -> tuple[Tensor, Tensor]:
        starts, bits = honest(*arguments)  # type: ignore[arg-type]
        return starts, bits if len(starts) < 2 else bits.roll(1)

    monkeypatch.setattr(row_ranges, "locate_consecutive", off_by_one)
    shards = tuple(cut(dense, 2, "rows"))
    placement = PackedPlacement(shards, (0, 0), 0, 0, 2)
    with pytest.raises(RuntimeError, match=r"table t\d"):
        mpe.shard_packed(ebc, ["cpu"] * 2, placement=placement)
    monkeypatch.undo()

    for how in ("tables", "rows"):
        shards = cut(dense, 2, how)
        verify_sharded(ShardedPackedEmbeddingBagCollection(ebc, shards, [CPU] * 2, CPU), ebc)
        for k in (0, 1):
            for buffer in ("alpha", "beta", "zero_rows", "weights"):
                sharded = ShardedPackedEmbeddingBagCollection(ebc, shards, [CPU] * 2, CPU)
                tbe = sharded.tbe.lookups[k].tbe
                values = getattr(tbe, buffer)
                if not values.numel():
                    continue  # no table on this device has a vector for 0-bit rows
                # The last bits of floats, or one bit of each code; a copy, for the unsharded tables may be the same.
                setattr(tbe, buffer, values ^ 1 if buffer == "weights" else values * (1 + 2**-20) + 2**-20)
                tbe.alpha[:, 0] = 0
                with pytest.raises(RuntimeError, match=r"table t\d, feature f\d: sharded and unsharded embeddings"):
                    verify_sharded(sharded, ebc)


@pytest.mark.parametrize("buffer", ["levels", "bases", "weights"])
def test_wrong_values_of_coded_tables_are_found(buffer: str) -> None:
    for seed, how in ((1, "tables"), (2, "rows"), (3, "rows")):
        ebc, dense = collection(seed, coded=True)
        shards = cut(dense, 2, how)
        verify_sharded(ShardedPackedEmbeddingBagCollection(ebc, shards, [CPU] * 2, CPU), ebc)
        for k in (0, 1):
            sharded = ShardedPackedEmbeddingBagCollection(ebc, shards, [CPU] * 2, CPU)
            tbe = sharded.tbe.lookups[k].tbe
            values = getattr(tbe, buffer)
            setattr(tbe, buffer, values ^ 1 if buffer == "weights" else values * (1 + 2**-6))
            with pytest.raises(RuntimeError, match=r"table t\d, feature f\d: sharded and unsharded embeddings"):
                verify_sharded(sharded, ebc)


def test_a_probe_of_ones_own_is_used() -> None:
    ebc, dense = collection(1)
    probe = KeyedJaggedTensor.from_lengths_sync(
        ["f0", "f1", "f2", "f3", "f4"], torch.tensor([0, 0, 0, len(dense[3]), 0]), torch.ones(5, dtype=torch.int64)
    )
    with pytest.raises(IndexError, match="table t3, feature f3"):
        mpe.shard_packed(ebc, ["cpu"], probe=probe)


def test_misuse_is_named() -> None:
    ebc, _ = collection(1)
    with pytest.raises(ValueError, match="no device"):
        mpe.shard_packed(ebc, [])
    with pytest.raises(ValueError, match="Linear holds no PackedEmbeddingBagCollection"):
        mpe.shard_packed(nn.Linear(1, 1), ["cpu"])
    with pytest.raises(PlannerError, match="do not fit into 2 devices"):
        mpe.shard_packed(ebc, ["cpu"] * 2, memory=2000)
    with pytest.raises(ValueError, match="two collections have a table of one name"):
        mpe.shard_packed(nn.ModuleList([ebc, collection(1)[0]]), ["cpu"])
    _, placement = mpe.shard_packed(ebc, ["cpu"])
    with pytest.raises(ValueError, match="table t0: the shards hold"):
        mpe.shard_packed(ebc, ["cpu"], placement=replace(placement, shards=placement.shards[1:]))


def test_expected_is_not_the_unsharded_lookup() -> None:
    """The expectation that other tests compare with is right by itself."""
    ebc, dense = collection(4)
    kjt = batch(dense, 5)
    torch.testing.assert_close(ebc(kjt).values().double(), expected(ebc, dense, kjt), rtol=1e-6, atol=1e-4)
