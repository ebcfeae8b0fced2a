"""Ids that are no rows, as FBGEMM treats them: on every backend, against FBGEMM's own op and lookup."""

from collections.abc import Iterator

import fbgemm_gpu  # noqa: F401  (registers its ops)
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode as FBGEMMBoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from tests.ops.every_backend import ALL, on
from tests.packing.random_tables import KINDS, random_tables
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.packed_embedding_bag import packed_embedding_bag
from torchrec_mpe.packing.packed_tables import PackedTables

DIM = 8
INDICES = torch.tensor([1, -1, -5, 2, 10**9, -1, 0, 3, -(2**31)])
OFFSETS = torch.tensor([0, 3, 3, 5, 6, 9])


@pytest.fixture(params=ALL, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on every backend."""
    with on(request.param):
        yield request.param


def lookup(packed: PackedTables, indices: Tensor, mode: int, pooling: int = 0, warning: Tensor | None = None) -> Tensor:
    tensors = packed.tensors().values()
    return packed_embedding_bag(
        *tensors,  # type: ignore[arg-type]
        [0, DIM],
        [0],
        [pooling],
        indices,
        OFFSETS,
        None,
        torch.float32,
        mode,
        warning,
    ).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE])
def test_bad_ids_read_row_0_and_are_counted(kind: Directory, mode: BoundsCheckMode) -> None:
    packed, dense = random_tables(int(kind), [DIM], [kind])
    corrected, warning, theirs = INDICES.clone(), torch.tensor([7]), torch.tensor([0])
    torch.ops.fbgemm.bounds_check_indices(torch.tensor([len(dense[0])]), corrected, OFFSETS.clone(), int(mode), theirs)
    assert (corrected == -1).sum() == 2
    rows = torch.where((corrected >= 0).unsqueeze(1), dense[0][corrected.clamp(min=0)], 0)
    for pooling in (0, 1):
        expected = torch.stack(
            [
                rows[low:high].sum(0) / (max(high - low, 1) if pooling else 1)
                for low, high in zip(OFFSETS.tolist(), OFFSETS.tolist()[1:], strict=False)
            ]
        )
        torch.testing.assert_close(lookup(packed, INDICES, mode, pooling), expected, rtol=1e-6, atol=1e-6)
    lookup(packed, INDICES, mode, warning=warning)
    # Ours adds to what is there, theirs starts from zero at every call.
    assert warning - 7 == theirs == (3 if mode == BoundsCheckMode.WARNING else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_fatal_names_the_first_bad_id(kind: Directory) -> None:
    packed, dense = random_tables(int(kind), [DIM], [kind])
    rows = len(dense[0])
    with pytest.raises(IndexError, match=rf"^table 0, feature 0: id -5 is not in \[0, {rows}\)$"):
        lookup(packed, INDICES, BoundsCheckMode.FATAL)
    pruned = INDICES.where((INDICES >= 0) & (rows > INDICES), -1)
    out = lookup(packed, pruned, BoundsCheckMode.FATAL)
    torch.testing.assert_close(out[0], dense[0][1], rtol=0, atol=0)
    assert not out[3].any(), "a bag of pruned rows is zeros"


@pytest.mark.supports("ids that are no rows: FBGEMM's four modes", "CPU")
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("mode", list(BoundsCheckMode)[:3])
def test_equals_fbgemms_inference_tbe(pooling: PoolingMode, mode: BoundsCheckMode) -> None:
    """The same rows as FP32 in FBGEMM: pruned ids count for MEAN there, too."""
    packed, dense = random_tables(5, [DIM], [Directory.NIBBLE])
    rows = len(dense[0])
    tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t", rows, DIM, SparseType.FP32, EmbeddingLocation.HOST)],
        pooling_mode=pooling,
        device="cpu",
        bounds_check_mode=FBGEMMBoundsCheckMode(int(mode)),
        output_dtype=SparseType.FP32,
    )
    tbe.initialize_weights()
    tbe.split_embedding_weights()[0][0].view(torch.float32).copy_(dense[0].float())
    indices = INDICES if mode != BoundsCheckMode.FATAL else INDICES.clamp(-1, rows - 1)
    theirs = tbe(indices.clone(), OFFSETS.clone())
    ours = lookup(packed, indices, mode, int(pooling == PoolingMode.MEAN))
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=1e-6)


def test_unchecked_ids_and_offsets_of_good_batches() -> None:
    packed, dense = random_tables(1, [DIM], [Directory.REMAP])
    indices = torch.arange(9) % len(dense[0])
    torch.testing.assert_close(
        lookup(packed, indices, BoundsCheckMode.NONE), lookup(packed, indices, BoundsCheckMode.FATAL), rtol=0, atol=0
    )


def test_out_is_written() -> None:
    packed, _ = random_tables(1, [DIM], [Directory.RANKED])
    arguments = (*packed.tensors().values(), [0, DIM], [0], [0], torch.tensor([0]), torch.tensor([0, 1]))

    def into(out: Tensor) -> Tensor:
        return packed_embedding_bag(*arguments, out=out)  # type: ignore[arg-type]

    out = torch.full((1, DIM), float("nan"))
    assert into(out) is out
    torch.testing.assert_close(out, packed_embedding_bag(*arguments), rtol=0, atol=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"out must be torch.float32, got torch.float64"):
        into(out.double())
    for wrong in (torch.empty(2, DIM), torch.empty(1, DIM + 1), torch.empty(DIM, 2).t()[:1]):
        with pytest.raises(ValueError, match=r"out must be \[1, 8\]"):
            into(wrong[:, ::2] if wrong.shape == (1, DIM) else wrong)
