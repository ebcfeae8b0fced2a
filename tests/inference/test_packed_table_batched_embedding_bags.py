"""The packed TBE's module: FBGEMM's calling conventions, buffers, bounds modes."""

import copy
import io

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from tests.packing.random_tables import KINDS as UNCODED
from tests.packing.random_tables import random_tables
from torchrec_mpe.inference.packed_table_batched_embedding_bags import PackedTableBatchedEmbeddingBags
from torchrec_mpe.ops.directory import Directory

DIMS = [8, 12, 16]
KINDS = [Directory.RANKED, Directory.NIBBLE, Directory.REMAP]
INDICES = torch.tensor([0, 1, 0, 2, 1, 1, 0, 0])
OFFSETS = torch.tensor([0, 2, 3, 3, 4, 6, 6, 7, 8])


def test_reads_like_fbgemms_tbe() -> None:
    """The same arguments and the same call, and FP32 tables in FBGEMM's: the same result."""
    packed, dense = random_tables(3, DIMS, KINDS)
    for pooling in (PoolingMode.SUM, PoolingMode.MEAN):
        options = {"feature_table_map": [0, 0, 1, 2], "pooling_mode": pooling}
        ours = PackedTableBatchedEmbeddingBags(
            packed, output_dtype=SparseType.FP32, bounds_check_mode=BoundsCheckMode.WARNING, **options
        )
        specs = [(f"t{t}", len(d), d.shape[1], SparseType.FP32, EmbeddingLocation.HOST) for t, d in enumerate(dense)]
        theirs = IntNBitTableBatchedEmbeddingBagsCodegen(specs, device="cpu", output_dtype=SparseType.FP32, **options)
        theirs.initialize_weights()
        for (weights, _), table in zip(theirs.split_embedding_weights(), dense, strict=True):
            weights.view(torch.float32).copy_(table.float())
        expected = theirs(INDICES.int(), OFFSETS.int())
        torch.testing.assert_close(ours(INDICES, OFFSETS), expected, rtol=1e-5, atol=1e-4)
        assert ours.D_offsets == [0, 8, 16, 28, 44]
        out = torch.empty(2, 44)
        assert ours(INDICES, OFFSETS, out=out) is out
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


def test_bad_ids_by_mode() -> None:
    packed, dense = random_tables(3, [8], [Directory.RANKED])
    bad, offsets = torch.tensor([0, 10**6, -7, -1]), torch.tensor([0, 4])
    with pytest.raises(IndexError, match=r"table t0, feature 0: id 1000000 is not in"):
        PackedTableBatchedEmbeddingBags(packed)(bad, offsets)
    counting = PackedTableBatchedEmbeddingBags(packed, bounds_check_mode=BoundsCheckMode.WARNING)
    for calls in (1, 2):
        torch.testing.assert_close(counting(bad, offsets)[0].double(), 3 * dense[0][0], rtol=1e-5, atol=1e-5)
        assert counting.bounds_check_warning is not None and int(counting.bounds_check_warning) == 2 * calls
    ignoring = PackedTableBatchedEmbeddingBags(packed, bounds_check_mode=BoundsCheckMode.IGNORE)
    torch.testing.assert_close(ignoring(bad, offsets), counting(bad, offsets), rtol=0, atol=0)
    assert ignoring.bounds_check_warning is None


def test_state_and_moves() -> None:
    packed, _ = random_tables(5, DIMS, KINDS)
    tbe = PackedTableBatchedEmbeddingBags(packed)
    indices, offsets = INDICES[:6], torch.tensor([0, 2, 3, 3, 4, 6, 6])
    before = tbe(indices, offsets)
    assert tbe.nbytes == tbe.size_report().total == sum(b.numel() * b.element_size() for b in tbe.buffers())
    for moved in (copy.deepcopy(tbe), copy.deepcopy(tbe).half(), copy.deepcopy(tbe).to("cpu")):
        torch.testing.assert_close(moved(indices, offsets), before, rtol=0, atol=0)
    other = PackedTableBatchedEmbeddingBags(packed)
    other.load_state_dict(tbe.state_dict())
    damaged = {name: tensor.clone() for name, tensor in tbe.state_dict().items()}
    damaged["run_starts"][0] = 5
    with pytest.raises(ValueError, match="table t0"):
        other.load_state_dict(damaged)
    assert "t1" in repr(tbe) and "nibble" in repr(tbe)


def test_misuse() -> None:
    packed, _ = random_tables(5, DIMS, KINDS)
    with pytest.raises(ValueError, match="feature_table_map must lie in"):
        PackedTableBatchedEmbeddingBags(packed, [3])
    with pytest.raises(ValueError, match="pooling modes"):
        PackedTableBatchedEmbeddingBags(packed, pooling_mode=PoolingMode.NONE)
    with pytest.raises(TypeError, match="output_dtype"):
        PackedTableBatchedEmbeddingBags(packed, output_dtype=torch.int8)
    with pytest.raises(ValueError, match="3 features need 3 labels"):
        PackedTableBatchedEmbeddingBags(packed, feature_labels=["one"])


@pytest.mark.supports("torch.export of the lookup, every row directory", "CPU")
@pytest.mark.parametrize("kind", UNCODED)
def test_exports_and_loads(kind: Directory) -> None:
    """The exported program holds one call of the op and runs as a program read from bytes."""
    packed, _ = random_tables(5, [16], [kind])
    tbe = PackedTableBatchedEmbeddingBags(packed)
    indices, offsets = torch.tensor([0, 1, 1]), torch.tensor([0, 2, 2, 3])
    ids, bags = torch.export.Dim("ids", min=2), torch.export.Dim("bags", min=3)
    program = torch.export.export(tbe, (indices, offsets), dynamic_shapes=({0: ids}, {0: bags}))
    assert sum("packed_embedding_bag" in str(node.target) for node in program.graph.nodes) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    read = torch.export.load(file).module()
    for n in (3, 7):
        i, o = torch.arange(n) % 2, torch.tensor([0, 1, n, n, n])
        torch.testing.assert_close(read(i, o), tbe(i, o), rtol=0, atol=0)
