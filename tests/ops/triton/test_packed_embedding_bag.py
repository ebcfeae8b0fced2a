"""The lookup on Triton against dense tables that owe nothing to packing, and against the reference op."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.packing.random_tables import KINDS, random_tables
from torchrec_mpe.ops.backends import use_backend
from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.reference.packed_embedding_bag import packed_embedding_bag as reference
from torchrec_mpe.ops.triton.packed_embedding_bag import packed_embedding_bag

DIMS = (1, 5, 8, 16, 24, 64, 128)


class Example:
    """Random tables and bags: two features read table 0; bags of 0 to 4 ids, one of 13."""

    def __init__(
        self,
        device: torch.device,
        dims: Sequence[int] = DIMS,
        kinds: Sequence[Directory] = (Directory.RANKED,),
        seed: int = 0,
        batch: int = 3,
        **options: Any,
    ) -> None:
        kinds = [kinds[t % len(kinds)] for t in range(len(dims))]
        with use_backend("reference"):
            packed, self.dense = random_tables(seed, dims, kinds, **options)
        self.packed = [tensor.to(device) for tensor in packed.tensors().values()]
        self.tables = [*range(len(dims)), 0]
        self.columns = [0]
        for t in self.tables:
            self.columns.append(self.columns[-1] + dims[t])
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 5, (len(self.tables) * batch,), generator=g)
        if batch:
            lengths[len(lengths) // 2] = 13
        self.batch = batch
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(device)
        of_feature = lengths.view(len(self.tables), batch).sum(1).tolist()
        ids = [
            torch.randint(len(self.dense[t]), (n,), generator=g) for t, n in zip(self.tables, of_feature, strict=True)
        ]
        self.ids = torch.cat(ids).to(device)
        self.weights = torch.randn(len(self.ids), generator=g).to(device)

    def arguments(self, **changes: Any) -> list[Any]:
        values: dict[str, Any] = {
            "D_offsets": self.columns,
            "feature_table_map": self.tables,
            "pooling_mode": [0] * len(self.tables),
            "indices": self.ids,
            "offsets": self.offsets,
            "per_sample_weights": None,
            "output_dtype": torch.float32,
            "bounds_check_mode": BoundsCheckMode.FATAL,
            "bounds_check_warning": None,
            "out": None,
        }
        return [*self.packed, *{**values, **changes}.values()]

    def expected(self, weighted: bool = False, mean: Sequence[int] = ()) -> Tensor:
        """float64 [B, total D], pooled from the dense tables; -1 adds nothing."""
        out = torch.zeros(self.batch, self.columns[-1], dtype=torch.float64)
        offsets = self.offsets.tolist()
        for f, t in enumerate(self.tables):
            for bag in range(self.batch):
                span = range(offsets[f * self.batch + bag], offsets[f * self.batch + bag + 1])
                for position in span:
                    row = int(self.ids[position])
                    if row >= 0:
                        weight = float(self.weights[position]) if weighted else 1.0
                        weight /= len(span) if f in mean else 1
                        out[bag, self.columns[f] : self.columns[f + 1]] += weight * self.dense[t][row]
        return out


def close(ours: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_every_directory_dimension_and_width(kind, device):
    example = Example(device, kinds=[kind], seed=int(kind))
    close(packed_embedding_bag(*example.arguments()), example.expected())


@pytest.mark.parametrize("bits", range(9))
def test_every_width_alone(bits, device):
    example = Example(device, (8, 24, 128), widths=[bits], max_rows=50)
    close(packed_embedding_bag(*example.arguments()), example.expected())


def test_kinds_mix_and_lines_follow_each_other(device):
    # Thousands of rows: many lines, so that a line's rank and base matter.
    example = Example(device, (5, 16, 8, 24, 16), KINDS, seed=11, max_rows=4000)
    close(packed_embedding_bag(*example.arguments()), example.expected())


@pytest.mark.parametrize("dim", [256, 520, 1024])
def test_rows_wider_than_a_program(dim, device):
    example = Example(device, (dim, 8), (Directory.RANKED, Directory.NIBBLE), batch=2, max_rows=20)
    close(packed_embedding_bag(*example.arguments()), example.expected())


@pytest.mark.parametrize("mode", [BoundsCheckMode.FATAL, BoundsCheckMode.NONE])
def test_weighted_sum_and_mean(mode, device):
    example = Example(device, (5, 16, 128), KINDS, seed=3)
    weighted = example.arguments(per_sample_weights=example.weights, bounds_check_mode=mode)
    close(packed_embedding_bag(*weighted), example.expected(weighted=True))
    half = example.arguments(per_sample_weights=example.weights.double(), bounds_check_mode=mode)
    close(packed_embedding_bag(*half), example.expected(weighted=True))
    mean = example.arguments(pooling_mode=[0, 1, 0, 1], bounds_check_mode=mode)
    close(packed_embedding_bag(*mean), example.expected(mean=(1, 3)))
    with pytest.raises(ValueError, match="MEAN pooling takes no per-sample weights"):
        packed_embedding_bag(*example.arguments(pooling_mode=[1] * 4, per_sample_weights=example.weights))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
def test_id_and_offset_dtypes(ids, offsets, device):
    example = Example(device, (16, 5))
    arguments = example.arguments(indices=example.ids.to(ids), offsets=example.offsets.to(offsets))
    close(packed_embedding_bag(*arguments), example.expected())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)],
)
def test_output_dtypes_and_out(dtype, tolerance, device):
    example = Example(device, (16, 5))
    fresh = packed_embedding_bag(*example.arguments(output_dtype=dtype))
    assert fresh.dtype == dtype
    close(fresh, example.expected(), tolerance)
    out = torch.full_like(fresh, float("nan"))
    assert packed_embedding_bag(*example.arguments(output_dtype=dtype, out=out)) is out
    assert torch.equal(out, fresh)
    with pytest.raises(ValueError, match="out must be"):
        packed_embedding_bag(*example.arguments(output_dtype=dtype, out=out[:1]))


@pytest.mark.parametrize("mode", list(BoundsCheckMode))
def test_empty_batch_and_empty_bags(mode, device):
    example = Example(device, (16, 5), batch=0)
    assert packed_embedding_bag(*example.arguments(bounds_check_mode=mode)).shape == (0, 37)
    example = Example(device, (16, 5), batch=2)
    example.ids, example.offsets = example.ids[:0], torch.zeros_like(example.offsets)
    out = packed_embedding_bag(*example.arguments(pooling_mode=[1] * 3, bounds_check_mode=mode))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("mode", list(BoundsCheckMode))
def test_pruned_ids_add_nothing_but_count_for_mean(mode, device):
    example = Example(device, (16, 5), KINDS[1:3], seed=2)
    example.ids[::3] = -1
    out = packed_embedding_bag(*example.arguments(pooling_mode=[0, 1, 1], bounds_check_mode=mode))
    close(out, example.expected(mean=(1, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_ids_read_row_0(kind, device):
    example = Example(device, (16, 520), [kind], seed=4, max_rows=30, batch=2)
    rows = torch.tensor([len(example.dense[t]) for t in example.tables])
    span = example.offsets[:: example.batch].cpu()
    bad = example.ids.clone()
    bad[0], bad[1], bad[2] = int(rows[0]), -2, 2**40
    bad[int(span[1])] = -(2**62)
    example.ids[[0, 1, 2, int(span[1])]] = 0
    warning = torch.tensor([5], device=device)
    for mode in (BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE):
        out = packed_embedding_bag(
            *example.arguments(indices=bad, bounds_check_mode=mode, bounds_check_warning=warning)
        )
        close(out, example.expected())
        assert int(warning) == 9  # once for each id, whatever the columns; IGNORE counts nothing


def test_fatal_names_the_first_bad_id(device):
    example = Example(device, (16, 300), batch=2, max_rows=30)
    first = int(example.offsets[2 * 2])  # of feature 2, which reads table 0
    rows = len(example.dense[0])
    example.ids[first + 1], example.ids[-1] = rows, -7
    with pytest.raises(IndexError, match=rf"^table 0, feature 2: id {rows} is not in \[0, {rows}\)$"):
        packed_embedding_bag(*example.arguments())
    example.ids[first] = -2
    with pytest.raises(IndexError, match=rf"^table 0, feature 2: id -2 is not in \[0, {rows}\)$"):
        packed_embedding_bag(*example.arguments())


def test_fatal_reports_bad_offsets_and_the_others_stay_inside(device):
    example = Example(device, (16, 5), batch=2)
    n = len(example.ids)
    for change, message in (
        ({2: n + 5}, "offsets must not decrease"),
        ({-1: n + 1}, "offsets must go from 0"),
        ({0: 1}, "offsets must go from 0"),
        ({2: -4}, "offsets must not decrease"),
    ):
        offsets = example.offsets.clone()
        for place, value in change.items():
            offsets[place] = value
        with pytest.raises(ValueError, match=message):
            packed_embedding_bag(*example.arguments(offsets=offsets))
        for mode in (BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE):
            out = packed_embedding_bag(*example.arguments(offsets=offsets, bounds_check_mode=mode))
            assert bool(out.isfinite().all())


def test_the_padding_at_the_end_adds_nothing(device):
    example = Example(device, (5, 24), (Directory.RANKED,), max_rows=3, widths=[3, 7])
    before = packed_embedding_bag(*example.arguments())
    example.packed[0][-64:] = 0xFF
    assert torch.equal(packed_embedding_bag(*example.arguments()), before)


def test_equals_the_reference_in_float64(device):
    example = Example(device, (5, 16, 128, 64), KINDS, seed=9)
    arguments = example.arguments(
        per_sample_weights=example.weights.double(), output_dtype=torch.float64, bounds_check_mode=BoundsCheckMode.NONE
    )
    torch.testing.assert_close(packed_embedding_bag(*arguments), reference(*arguments), rtol=1e-12, atol=1e-12)


def test_misaligned_weights_are_refused(device):
    example = Example(device, (16,))
    example.packed[0] = torch.cat([example.packed[0][:1], example.packed[0]])[1:]
    with pytest.raises(ValueError, match="weights must start at a multiple of 8 bytes"):
        packed_embedding_bag(*example.arguments())
