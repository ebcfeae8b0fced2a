"""Plans without a search, by hand and to a byte budget."""

import math

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mpe import precision_from_frequencies
from torchrec_mpe.precision.from_frequencies import _rule_segments, cut_precision, uniform_precision


def config(name: str, rows: int, dim: int = 16) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[name])


def test_uniform() -> None:
    plan = uniform_precision([config("a", 5), config("b", 3)], 6)
    assert plan.tables["a"].of_rows().tolist() == [6] * 5 and plan.average_bits == 6


def test_cut_takes_the_most_frequent_of_all_tables() -> None:
    counts = {"a": torch.tensor([1, 50, 3, 2]), "b": torch.tensor([40, 4])}
    plan = cut_precision(counts, [config("a", 4), config("b", 2)], 4, 0.5)
    assert plan.tables["a"].of_rows().tolist() == [0, 4, 0, 0]
    assert plan.tables["b"].of_rows().tolist() == [4, 4]
    everything = cut_precision(counts, [config("a", 4), config("b", 2)], 4, 1.0)
    assert everything.average_bits == 4
    with pytest.raises(ValueError, match="fraction"):
        cut_precision(counts, [config("a", 4), config("b", 2)], 4, 0.0)


def test_rule_is_one_bit_per_fourfold_count() -> None:
    """``clip(round(log2(c / c0) / 2), 0, 6)`` element by element, c0 = 4 (offset -1)."""
    counts = torch.arange(40_000, -1, -1)
    bounds, bits = _rule_segments(counts, -1.0)
    widths = torch.repeat_interleave(torch.tensor(bits), torch.tensor(bounds).diff())
    chosen = [*range(0, 40_001, 37), *range(39_990, 40_001)]  # the head, and every count down to 0
    for c, width in zip(counts[chosen].tolist(), widths[chosen].tolist(), strict=True):
        exact = math.log2(c / 4) / 2 if c else -1.0
        if abs(exact - math.floor(exact) - 0.5) > 1e-9:  # at a half either neighbour is right
            assert width == min(6, max(0, round(exact))), c


@pytest.mark.parametrize("ratio", [12, 30, 60, 100])
def test_rule_meets_the_byte_target(ratio: float) -> None:
    """Zipf counts with many ties at the bottom, so that one count's rows must be split."""
    tables = [config("a", 30_000), config("b", 5_000), config("c", 40)]
    counts = {t.name: (3e4 / torch.arange(1, t.num_embeddings + 1)).long() for t in tables}
    plan = precision_from_frequencies(counts, tables, ratio=ratio)
    size = plan.size_report()
    assert abs(size.total / (size.fp32_bytes / ratio) - 1) < 0.01
    for table in tables:
        widths = plan.tables[table.name].of_rows().long()
        assert (widths[1:] <= widths[:-1]).all(), "a more frequent row never has fewer bits"
    by_bytes = precision_from_frequencies(counts, tables, bytes=round(size.fp32_bytes / ratio))
    assert by_bytes.size_report().total == size.total


def test_unseen_rows_get_no_bits() -> None:
    counts = {"a": torch.tensor([0, 9, 0, 100, 5] * 200)}
    plan = precision_from_frequencies(counts, [config("a", 1000)], ratio=12)
    assert not plan.tables["a"].of_rows()[counts["a"] == 0].any()


def test_a_model_stands_for_its_tables() -> None:
    tables = [config("a", 3000), config("b", 500)]
    counts = {t.name: (3e3 / torch.arange(1, t.num_embeddings + 1)).long() for t in tables}
    model = torch.nn.Sequential(EmbeddingBagCollection(tables))
    by_model, by_tables = (precision_from_frequencies(counts, m, ratio=20) for m in (model, tables))
    assert by_model.tables == by_tables.tables
    assert uniform_precision(model, 3).tables == uniform_precision(tables, 3).tables
    assert cut_precision(counts, model, 4, 0.2).tables == cut_precision(counts, tables, 4, 0.2).tables
    with pytest.raises(KeyError, match="no counts for table b; counted tables: a"):
        precision_from_frequencies({"a": counts["a"]}, model, ratio=20)


def test_targets_out_of_reach_are_told() -> None:
    counts = {"a": torch.tensor([5, 1, 1])}
    with pytest.raises(ValueError, match="no plan comes within 1% of 2 bytes"):
        precision_from_frequencies(counts, [config("a", 3)], ratio=100)
    with pytest.raises(ValueError, match="either ratio or bytes"):
        precision_from_frequencies(counts, [config("a", 3)])
    with pytest.raises(ValueError, match="table a has 4 rows, its counts 3"):
        precision_from_frequencies(counts, [config("a", 4)], ratio=2)
