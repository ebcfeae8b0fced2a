"""Widths and scales for trained rows: budgets met, bounds kept, and errors below those of simpler rules."""

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_mpe import precision_from_frequencies
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.packing.size import packed_bytes, size_report
from torchrec_mpe.precision.from_errors import PostTrainingPrecision, precision_from_errors


def config(name: str, rows: int, dim: int = 16) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[name])


TABLES = [config("a", 3000), config("b", 800, 12), config("c", 30)]


def trained(seed: int = 0, shuffled: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows that grew with the root of their counts, as training makes them, and Zipf counts."""
    g = torch.Generator().manual_seed(seed)
    rows, counts = {}, {}
    for table in TABLES:
        n = table.num_embeddings
        ids = torch.randperm(n, generator=g) if shuffled else torch.arange(n)
        count = (n / (1 + ids)).long()
        spread = 0.01 + 0.05 * count.float().sqrt()
        rows[table.name] = torch.randn(n, table.embedding_dim, generator=g) * spread.unsqueeze(1) + 0.02
        counts[table.name] = count
    return rows, counts


def sources(rows: dict[str, Tensor]) -> dict[str, object]:
    return {name: (lambda start, stop, w=w: w[start:stop]) for name, w in rows.items()}


def find(rows: dict[str, Tensor], counts: dict[str, Tensor] | None, **target: object) -> PostTrainingPrecision:
    return precision_from_errors(sources(rows), TABLES, counts, **target)  # type: ignore[arg-type]


def by_hand(rows: Tensor, bits: Tensor, alpha: Tensor, beta: Tensor, zero_row: Tensor | None) -> Tensor:
    """Quantized rows, one width at a time."""
    out = torch.zeros_like(rows) if zero_row is None else zero_row.expand_as(rows).clone()
    for b in range(1, 9):
        chosen = bits == b
        codes = ((rows[chosen] - beta) / alpha[b]).round().clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1)
        out[chosen] = codes * alpha[b] + beta
    return out


def weighted_error(found: PostTrainingPrecision, rows: dict[str, Tensor], counts: dict[str, Tensor]) -> float:
    total = 0.0
    for name, w in rows.items():
        s = found.scales[name]
        quantized = by_hand(w, found.plan.tables[name].of_rows(), s.alpha, s.beta, s.zero_row)
        total += float(counts[name].double() @ (w - quantized).double().square().sum(1))
    return total


def real_bytes(found: PostTrainingPrecision, rows: dict[str, Tensor]) -> int:
    packed = pack_tables(
        [
            TableToPack(n, found.plan.tables[n], lambda a, b, w=w: w[a:b], s.alpha, s.beta, s.zero_row)  # type: ignore[misc]
            for n, w in rows.items()
            for s in (found.scales[n],)
        ]
    )
    return size_report(packed).total


@pytest.mark.parametrize(("ratio", "shuffled"), [(5, True), (16, True), (40, True), (16, False)])
def test_real_bytes_meet_the_budget(ratio: float, shuffled: bool) -> None:
    rows, counts = trained(shuffled=shuffled)
    found = find(rows, counts, ratio=ratio)
    budget = sum(4 * w.numel() for w in rows.values()) / ratio
    assert 0.99 * budget <= real_bytes(found, rows) <= budget
    by_bytes = find(rows, counts, bytes=int(budget))
    assert by_bytes.plan.tables == found.plan.tables


def test_more_bytes_never_mean_a_larger_error() -> None:
    rows, counts = trained()
    errors = [weighted_error(find(rows, counts, ratio=r), rows, counts) for r in (40, 20, 12, 8, 5)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [1, 3, 6])
def test_better_than_one_width_at_the_same_bytes(bits: int) -> None:
    """The best step size of one width, found among 400; the mixed widths must at least halve its error."""
    rows, counts = trained()
    uniform = {n: TableBitWidths(len(w), w.shape[1], (0, len(w)), (bits,)) for n, w in rows.items()}
    size = packed_bytes(uniform, shared_scales=False).total
    simple = 0.0
    for name, w in rows.items():
        weights = counts[name].double()
        beta = (weights @ w.double() / weights.sum()).float()
        of_width = torch.full((len(w),), bits)
        errors = []
        for step in torch.logspace(-4, 1, 400):
            quantized = by_hand(w, of_width, torch.full((9,), float(step)), beta, None)
            errors.append(float(weights @ (w - quantized).double().square().sum(1)))
        simple += min(errors)
    found = find(rows, counts, bytes=size)
    assert real_bytes(found, rows) <= size
    assert weighted_error(found, rows, counts) < simple / 2


@pytest.mark.parametrize("ratio", [8, 30])
def test_better_than_the_frequency_rule_at_the_same_bytes(ratio: float) -> None:
    rows, counts = trained()
    plan = precision_from_frequencies(counts, TABLES, ratio=ratio)
    size = packed_bytes(plan.tables, shared_scales=False).total
    rule = 0.0
    for name, w in rows.items():
        weights, bits = counts[name].double(), plan.tables[name].of_rows()
        beta = (weights @ w.double() / weights.sum()).float()
        alpha = torch.ones(9)
        for b in bits.unique().tolist():
            if b:
                chosen = bits == b
                of_step: dict[float, float] = {}
                for step in torch.logspace(-3, 1, 100).tolist():
                    off = (w - by_hand(w, bits, torch.full((9,), step), beta, None))[chosen]
                    of_step[step] = float(weights[chosen] @ off.double().square().sum(1))
                alpha[b] = min(of_step, key=of_step.__getitem__)
        rule += float(weights @ (w - by_hand(w, bits, alpha, beta, beta)).double().square().sum(1))
    assert weighted_error(find(rows, counts, bytes=size), rows, counts) < rule


@pytest.mark.parametrize("bound", [0.2, 0.05])
def test_error_bound_is_kept_by_every_table_and_used(bound: float) -> None:
    rows, counts = trained()
    found = find(rows, counts, max_error=bound)
    for name, w in rows.items():
        s = found.scales[name]
        quantized = by_hand(w, found.plan.tables[name].of_rows(), s.alpha, s.beta, s.zero_row)
        weights = counts[name].double()
        error = float(weights @ (w - quantized).double().square().sum(1))
        relative = (error / float(weights @ w.double().square().sum(1))) ** 0.5
        assert relative <= bound
        if len(w) > 100:
            assert relative > 0.9 * bound, "bytes are left that the bound does not need"
    looser = find(rows, counts, max_error=2 * bound)
    assert real_bytes(looser, rows) < real_bytes(found, rows)


def test_rows_that_are_looked_up_more_get_more_bits() -> None:
    g = torch.Generator().manual_seed(0)
    tables = [config("often", 2000), config("seldom", 2000)]
    rows = {t.name: torch.randn(2000, 16, generator=g) for t in tables}
    counts = {"often": torch.full((2000,), 64), "seldom": torch.ones(2000, dtype=torch.int64)}
    found = precision_from_errors(sources(rows), tables, counts, ratio=8)  # type: ignore[arg-type]
    # The error falls fourfold a bit: 64 times the lookups are worth three bits.
    often, seldom = (found.plan.tables[n].average_bits for n in ("often", "seldom"))
    assert 2 <= often - seldom <= 4


def test_without_counts_rows_count_alike() -> None:
    rows, _ = trained()
    alike = {name: torch.ones(len(w), dtype=torch.int64) for name, w in rows.items()}
    found, expected = find(rows, None, ratio=12), find(rows, alike, ratio=12)
    assert found.plan.tables == expected.plan.tables
    assert "counts_sha256" in expected.plan.provenance and "counts_sha256" not in found.plan.provenance
    assert all(table.order is None for table in found.plan.tables.values())


def test_unseen_rows_get_bits_last() -> None:
    rows, counts = trained()
    counts["a"][::2] = 0
    tight = find(rows, counts, ratio=40).plan.tables["a"].of_rows()
    assert not tight[::2].any() and tight[1::2].any()
    loose = find(rows, counts, ratio=4.5)
    assert real_bytes(loose, rows) > 0.99 * sum(4 * w.numel() for w in rows.values()) / 4.5


def test_a_budget_that_no_error_needs_is_left_over() -> None:
    rows, counts = trained()
    found = find(rows, counts, ratio=2)
    assert real_bytes(found, rows) < 0.6 * sum(4 * w.numel() for w in rows.values()) / 2
    squares = sum(float(counts[n].double() @ w.double().square().sum(1)) for n, w in rows.items())
    assert weighted_error(found, rows, counts) < 1e-4 * squares


def test_zero_rows() -> None:
    rows, counts = trained()
    learned, zero = (find(rows, counts, ratio=40, zero_row=kind) for kind in ("learned", "zero"))
    assert all(s.zero_row is None for s in zero.scales.values())
    weights, bits = counts["a"].double(), learned.plan.tables["a"].of_rows()
    mean = weights[bits == 0] @ rows["a"][bits == 0].double() / weights[bits == 0].sum()
    assert learned.scales["a"].zero_row is not None
    assert float((learned.scales["a"].zero_row - mean).abs().max()) < 0.1 * float(mean.abs().max())
    assert real_bytes(zero, rows) <= sum(4 * w.numel() for w in rows.values()) / 40


def test_constant_and_zero_tables() -> None:
    tables = [config("zeros", 100, 8), config("ones", 100, 8)]
    rows = {"zeros": torch.zeros(100, 8), "ones": torch.ones(100, 8)}
    found = precision_from_errors(sources(rows), tables, None, max_error=1e-3)  # type: ignore[arg-type]
    for name, w in rows.items():
        s = found.scales[name]
        quantized = by_hand(w, found.plan.tables[name].of_rows(), s.alpha, s.beta, s.zero_row)
        torch.testing.assert_close(quantized, w)
    assert found.plan.average_bits == 0


def test_mistakes() -> None:
    rows, counts = trained()
    with pytest.raises(ValueError, match="one of ratio, bytes and max_error"):
        find(rows, counts)
    with pytest.raises(ValueError, match="one of ratio, bytes and max_error"):
        find(rows, counts, ratio=4, bytes=5)
    with pytest.raises(ValueError, match="must be a positive number, got 0"):
        find(rows, counts, ratio=0)
    with pytest.raises(ValueError, match=r"budget of 100 bytes cannot be met: without any bits the tables take \d"):
        find(rows, counts, bytes=100)
    with pytest.raises(ValueError, match=r"table a: a relative error of 1e-05 cannot be met: rows of 8 bits reach 0"):
        find(rows, counts, max_error=1e-5)
    with pytest.raises(KeyError, match="no rows for table c; tables with rows: a, b"):
        find({n: rows[n] for n in "ab"}, counts, ratio=8)
    with pytest.raises(KeyError, match="no counts for table c; counted tables: a, b"):
        find(rows, {n: counts[n] for n in "ab"}, ratio=8)
    with pytest.raises(ValueError, match="table b has 800 rows, its counts 3"):
        find(rows, {**counts, "b": torch.ones(3, dtype=torch.int64)}, ratio=8)
    with pytest.raises(ValueError, match="table a: rows 0 to 2999 hold NaN"):
        find({**rows, "a": rows["a"] / 0 * 0}, counts, ratio=8)
