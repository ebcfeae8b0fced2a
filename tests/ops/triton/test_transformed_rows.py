"""Coded tables on Triton against the rows that they were made from, and against the reference op."""

import pytest
import torch

from tests.ops.triton.test_packed_embedding_bag import Example, close
from tests.packing.random_codings import coded_collection
from torchrec_mpe.ops.backends import use_backend
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.reference.packed_embedding_bag import packed_embedding_bag as reference
from torchrec_mpe.ops.reference.run_coding import level_count
from torchrec_mpe.ops.triton.packed_embedding_bag import packed_embedding_bag
from torchrec_mpe.ops.triton.transformed_rows import levels_of_runs

DIMS = (1, 3, 8, 16, 33, 64, 128, 256)


def coded_example(device, dims, components, seed=0, batch=3, **options):
    """Bags of an Example whose tables are those of :func:`coded_collection`."""
    example = Example(device, dims, seed=seed, batch=batch, max_rows=options.get("rows", 200))
    with use_backend("reference"):
        packed, example.dense = coded_collection(seed, dims, components, **options)
    example.packed = [tensor.to(device) for tensor in packed.tensors().values()]
    return example


@pytest.mark.supports("lookup: transform-coded tables", "Triton's interpreter")
@pytest.mark.parametrize("remap", [False, True])
@pytest.mark.parametrize("components", [0, 1, 2, 4, 8, 16])
def test_every_dimension_and_number_of_components(components, remap, device):
    directory = "remap" if remap and components in (1, 4) else "auto"
    example = coded_example(device, DIMS, [components] * len(DIMS), seed=components, remap=remap, directory=directory)
    close(packed_embedding_bag(*example.arguments()), example.expected())


@pytest.mark.parametrize("dim", [8, 16, 33, 64, 128, 256, 600])
def test_one_dimension_alone(dim, device):
    """Tiles of their own: a lane has 16 components, or 8, 4, 2, 1, or only every second lane one."""
    example = coded_example(device, (dim, dim), [16, 5], seed=dim)
    close(packed_embedding_bag(*example.arguments()), example.expected())


@pytest.mark.parametrize("pooling", ["sum", "mean", "weighted"])
def test_coded_tables_beside_others(pooling, device):
    example = coded_example(device, (16, 64, 5, 16, 64, 40), [16, None, 2, None, 8, 0], seed=5)
    weights = example.weights if pooling == "weighted" else None
    mean = list(range(7)) if pooling == "mean" else []
    arguments = example.arguments(per_sample_weights=weights, pooling_mode=[int(pooling == "mean")] * 7)
    close(packed_embedding_bag(*arguments), example.expected(weighted=pooling == "weighted", mean=mean))


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_reference_in_float64(seed, device):
    """Levels and bases are anything here, which rows that were made from codes are not."""
    example = coded_example(device, (16, 128, 33), [16, 8, 5], seed=seed, rows=60, remap=seed % 2 == 1)
    g = torch.Generator().manual_seed(seed)
    for place, tensor in enumerate(example.packed):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            example.packed[place] = torch.randn(tensor.shape, generator=g).to(tensor.dtype).to(device)
    arguments = example.arguments(
        per_sample_weights=example.weights.double(), output_dtype=torch.float64, bounds_check_mode=BoundsCheckMode.NONE
    )
    torch.testing.assert_close(packed_embedding_bag(*arguments), reference(*arguments), rtol=1e-12, atol=1e-12)
    half = example.arguments(output_dtype=torch.bfloat16)
    torch.testing.assert_close(packed_embedding_bag(*half), reference(*half), rtol=1e-2, atol=1e-2)


def test_bad_and_pruned_ids(device):
    example = coded_example(device, (16, 40), [4, 2], seed=3)
    bad = example.ids.clone()
    bad[::3], bad[1] = -1, 10**6
    example.ids[::3], example.ids[1] = -1, 0
    out = packed_embedding_bag(*example.arguments(indices=bad, bounds_check_mode=BoundsCheckMode.IGNORE))
    close(out, example.expected())
    with pytest.raises(IndexError, match="table 0, feature 0: id 1000000 is not in"):
        packed_embedding_bag(*example.arguments(indices=bad))


def test_levels_of_more_runs_than_a_block(device):
    """160 runs, of one and two levels in turn and without any."""
    codings = [0, 3, -(2**31) + 0x21, -(2**31) + 0x20, -(2**31)] * 32
    records = torch.tensor([[0, coding << 32] for coding in codings], device=device)
    counts = [level_count(coding & 0xFFFFFFFF, 2) for coding in codings]
    levels = torch.arange(1.0, 1 + sum(counts)).bfloat16()
    of_runs = levels_of_runs(
        records,
        torch.tensor([0, 160], dtype=torch.int32, device=device),
        levels.to(device),
        torch.tensor([0], dtype=torch.int32, device=device),
        torch.tensor([2], dtype=torch.int32, device=device),
    ).cpu()
    for run, (coding, of_run) in enumerate(zip(codings, levels.float().split(counts), strict=True)):
        expected = torch.zeros(2, 16)
        if coding == 3:
            expected[0, 0] = of_run[0]
        for k in (0, 1) if coding < 0 else ():
            if coding >> 4 * k & 15:
                expected[:, k], of_run = of_run[:2], of_run[2:]
        assert torch.equal(of_runs[run], expected), run
