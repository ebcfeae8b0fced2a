"""A DLRM with packed tables, traced by TorchRec's Tracer, scripted, saved and run where torchrec_mpe is not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchrec.fx import Tracer
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.inference.sharded.random_collections import batch, collection, cut
from torchrec_mpe.inference.sharded.sharded_collection import LEAF_MODULES, ShardedPackedEmbeddingBagCollection
from torchrec_mpe.ops import library
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables

pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="scripted modules call the compiled operators")

CPU = torch.device("cpu")

_SERVE = """
import sys, torch
import fbgemm_gpu  # the operators of KeyedJaggedTensor
torch.ops.load_library(sys.argv[1])
inputs = torch.load(sys.argv[2])
for path in sys.argv[3:]:
    logits = torch.jit.load(path)(inputs["dense"], inputs["ids"], inputs["lengths"])
    assert torch.equal(logits, inputs["want"]), path
assert not [name for name in sys.modules if name.startswith("torchrec")]
print("equal")
"""


class Server(nn.Module):
    """From plain tensors, which any host can make."""

    def __init__(self, model: nn.Module, features: list[str]) -> None:
        super().__init__()
        self.model = model
        self.features = features

    def forward(self, dense: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.model(dense, KeyedJaggedTensor.from_lengths_sync(self.features, ids, lengths))


def dlrm() -> Server:
    g = torch.Generator().manual_seed(0)
    configs = [
        EmbeddingBagConfig(name=f"t{k}", num_embeddings=400, embedding_dim=8, feature_names=[f"f{k}"]) for k in range(3)
    ]
    tables: list[TableToPack] = []
    for config in configs:
        weight = torch.randn(400, 8, generator=g)
        ranks = torch.randperm(400, generator=g).int() if config.name == "t1" else None
        widths = TableBitWidths(400, 8, (0, 40, 200, 400), (6, 2, 0), ranks)
        alpha = torch.tensor([0.0, *[0.1] * 8])
        tables.append(TableToPack(config.name, widths, lambda a, b, w=weight: w[a:b], alpha, torch.zeros(8)))
    torch.manual_seed(0)
    model = DLRM(EmbeddingBagCollection(tables=configs), 4, [8, 8], [8, 1])
    model.sparse_arch.embedding_bag_collection = mpe.PackedEmbeddingBagCollection(configs, pack_tables(tables))
    return Server(model, ["f2", "f0", "f1"]).eval()


def script(model: nn.Module) -> torch.jit.ScriptModule:
    graph = Tracer(leaf_modules=LEAF_MODULES).trace(model)
    return torch.jit.script(torch.fx.GraphModule(model, graph))


@pytest.mark.supports("FX and TorchScript of a packed DLRM, loaded without this package", "CPU")
def test_a_dlrm_on_one_and_two_devices_runs_without_torchrec_mpe(tmp_path: Path) -> None:
    model = dlrm()
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 4, (15,), generator=g)
    ids = torch.randint(0, 400, (int(lengths.sum()),), generator=g)
    dense = torch.randn(5, 4, generator=g)
    want = model(dense, ids, lengths)
    size = model.model.sparse_arch.embedding_bag_collection.size_report().total
    paths = [str(tmp_path / "one.pt"), str(tmp_path / "two.pt")]
    for path, devices in zip(paths, (1, 2), strict=True):
        served, placement = mpe.shard_packed(model, ["cpu"] * devices, memory=size // devices + 400)
        assert placement.num_devices == devices
        scripted = script(served)
        assert torch.equal(scripted(dense, ids, lengths), want)
        assert scripted(dense[:0], ids[:0], lengths[:0]).shape == (0, 1)
        scripted.save(path)
    inputs = tmp_path / "inputs.pt"
    torch.save({"dense": dense, "ids": ids, "lengths": lengths, "want": want}, inputs)
    command = [sys.executable, "-W", "ignore", "-c", _SERVE, str(library.LIBRARY), str(inputs), *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("how", ["tables", "rows", "mixed"])
@pytest.mark.parametrize("weighted", [False, True])
def test_scripted_without_tracing(how: str, weighted: bool) -> None:
    """Every directory kind, in every order of features, on one and three devices."""
    ebc, dense = collection(1, weighted)
    for devices in (1, 3):
        sharded = ShardedPackedEmbeddingBagCollection(ebc, cut(dense, devices, how), [CPU] * devices, CPU)
        scripted = torch.jit.script(sharded)
        for bags in (0, 6):
            for dtype in (torch.int32, torch.int64):
                kjt = batch(dense, bags, dtype, weighted)
                got = scripted(kjt)
                assert got.keys() == ebc(kjt).keys()
                assert torch.equal(got.values(), sharded(kjt).values())


def test_scripted_modules_meet_bad_input() -> None:
    ebc, dense = collection(1)
    sharded = ShardedPackedEmbeddingBagCollection(ebc, cut(dense, 2, "rows"), [CPU] * 2, CPU)
    scripted = torch.jit.script(sharded)
    good = batch(dense, 3)
    make = KeyedJaggedTensor.from_lengths_sync
    with pytest.raises(RuntimeError, match=r"id 1000000 is not in"):
        scripted(make(good.keys(), torch.full_like(good.values(), 10**6), good.lengths()))
    with pytest.raises(torch.jit.Error, match="table t0, feature f0: the features have only"):
        scripted(make(["f1"], torch.tensor([0]), torch.tensor([1])))
    names = ["f0", "f1", "f2", "f3", "f4"]
    ones = torch.ones(10, dtype=torch.int64)
    inverse = KeyedJaggedTensor(
        names, torch.zeros_like(ones), lengths=ones, stride=2, inverse_indices=(names, torch.zeros(5, 3).long())
    )
    with pytest.raises(torch.jit.Error, match="takes no inverse indices"):
        scripted(inverse)
    for mode in (1, 2, 3):
        ebc, dense = collection(1, mode=mode)
        sharded = ShardedPackedEmbeddingBagCollection(ebc, cut(dense, 2, "rows"), [CPU] * 2, CPU)
        scripted = torch.jit.script(sharded)
        ids = good.values().clone()
        ids[0] = 0 if mode == 3 else 10**6
        kjt = make(good.keys(), ids, good.lengths())
        assert torch.equal(scripted(kjt).values(), sharded(kjt).values())
