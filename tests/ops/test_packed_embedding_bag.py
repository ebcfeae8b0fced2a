"""The packed lookup against a loop over ids, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.packing.test_packing import ALPHA, any_widths, to_pack
from torchrec_mpe import TableBitWidths
from torchrec_mpe.ops import packed_embedding_bag
from torchrec_mpe.packing import PackedTables, pack_tables


def lookup(
    packed: PackedTables,
    features: list[int],
    indices: Tensor,
    offsets: Tensor,
    mean: bool = False,
    per_sample_weights: Tensor | None = None,
    output_dtype: torch.dtype = torch.float64,
) -> Tensor:
    columns = [0]
    for t in features:
        columns.append(columns[-1] + packed.tables[t].embedding_dim)
    return packed_embedding_bag(
        *packed.tensors().values(),  # type: ignore[arg-type]
        columns,
        features,
        [int(mean)] * len(features),
        indices,
        offsets,
        per_sample_weights,
        output_dtype,
    )


def row_by_hand(widths: TableBitWidths, seed: int, row: int) -> Tensor:
    """The dequantized row, from the definition and the unpacked values."""
    table = to_pack("t", widths, seed)
    bits = int(widths.of_rows()[row])
    if bits == 0:
        return torch.full((widths.embedding_dim,), 7.0, dtype=torch.float64)
    x = table.rows(row, row + 1)[0]
    code = ((x - table.beta) / ALPHA[bits]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return code.double() * ALPHA[bits].double() + table.beta.double()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(any_widths(), min_size=1, max_size=3),
    st.integers(0, 4),
    st.sampled_from(["sum", "mean", "weighted"]),
    st.sampled_from([torch.int32, torch.int64]),
    st.integers(0, 2**16),
)
def test_equals_a_loop(tables: list[TableBitWidths], bags: int, pooling: str, dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    packed = pack_tables([to_pack(f"t{k}", w, seed=k) for k, w in enumerate(tables)])
    features = torch.randint(len(tables), (4,), generator=g).tolist()  # tables repeat, and may be left out
    lengths = torch.randint(0, 4, (len(features) * bags,), generator=g)
    ids = [
        torch.randint(tables[t].num_embeddings, (int(n),), generator=g)
        for t, part in zip(features, lengths.view(len(features), bags), strict=True)
        for n in part
    ]
    indices = torch.cat([*ids, torch.zeros(0, dtype=torch.int64)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    weights = torch.rand(len(indices), generator=g, dtype=torch.float64) if pooling == "weighted" else None
    out = lookup(packed, features, indices.to(dtype), offsets.to(dtype), pooling == "mean", weights)
    assert out.shape == (bags, sum(tables[t].embedding_dim for t in features))
    column = 0
    for f, t in enumerate(features):
        dim = tables[t].embedding_dim
        for b in range(bags):
            low, high = int(offsets[f * bags + b]), int(offsets[f * bags + b + 1])
            expected = torch.zeros(dim, dtype=torch.float64)
            for i in range(low, high):
                weight = 1.0 if weights is None else float(weights[i])
                expected += weight * row_by_hand(tables[t], t, int(indices[i]))
            if pooling == "mean":
                expected /= max(1, high - low)
            torch.testing.assert_close(out[b, column : column + dim], expected, rtol=1e-9, atol=1e-9)
        column += dim


def one_table() -> tuple[PackedTables, Tensor, Tensor]:
    widths = TableBitWidths(20, 8, (0, 1, 4, 9, 15, 20), (8, 6, 3, 1, 0))
    return pack_tables([to_pack("t", widths)]), torch.tensor([0, 19, 3, 8, 14, 15]), torch.tensor([0, 2, 2, 6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_types(dtype: torch.dtype) -> None:
    packed, indices, offsets = one_table()
    exact = lookup(packed, [0], indices, offsets)
    out = lookup(packed, [0], indices, offsets, output_dtype=dtype)
    assert out.dtype == dtype and not out[1].any()
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("bad", [-1, 20, 2**31 - 1])
def test_ids_out_of_range_name_the_table(bad: int) -> None:
    with pytest.raises(IndexError, match=rf"table 0 \(feature 0\): id {bad} is not in \[0, 20\)"):
        lookup(one_table()[0], [0], torch.tensor([3, bad]), torch.tensor([0, 2]))


@pytest.mark.parametrize("offsets", [[0, 3], [1, 2], [0, 2, 1, 2], [0, -1, 2]])
def test_offsets_must_rise_to_the_ids(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets must"):
        lookup(one_table()[0], [0], torch.tensor([3, 4]), torch.tensor(offsets))


def test_misuse() -> None:
    packed, indices, offsets = one_table()
    with pytest.raises(ValueError, match="MEAN pooling takes no per-sample weights"):
        lookup(packed, [0], indices, offsets, mean=True, per_sample_weights=torch.ones(6))
    with pytest.raises(TypeError, match="indices must be int32 or int64"):
        lookup(packed, [0], indices.float(), offsets)
    with pytest.raises(ValueError, match="feature_table_map"):
        packed_embedding_bag(*packed.tensors().values(), [0, 8], [1], [0], indices, offsets)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch"):
        lookup(packed, [0, 0], indices, offsets)
    with pytest.raises(TypeError, match="output_dtype"):
        lookup(packed, [0], indices, offsets, output_dtype=torch.int32)
    with pytest.raises(ValueError, match="per_sample_weights"):
        lookup(packed, [0], indices, offsets, per_sample_weights=torch.ones(5))
