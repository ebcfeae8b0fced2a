"""One model, many threads."""

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.threads import repeat_in_threads
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables


@pytest.mark.supports("eight threads on one model, bit-equal", "CPU")
def test_eight_threads_on_one_model(stress_seconds: float) -> None:
    """Each thread's answers are bit for bit those of one thread, for requests of all sizes."""
    generator = torch.Generator().manual_seed(3)
    names, rows, dims = ["t1", "t2", "t3"], [50_000, 20_000, 1000], [16, 64, 24]
    tables = []
    for t, (name, table_rows, dim) in enumerate(zip(names, rows, dims, strict=True)):
        weight = torch.randn(table_rows, dim, generator=generator)
        bounds, bits = (0, table_rows // 10, table_rows // 3, table_rows), (6, 3, 1) if t else (8, 4, 0)
        ranks = torch.randperm(table_rows, generator=generator).to(torch.int32) if t else None
        alpha = torch.tensor([0.0, *(2.0 / 2**b for b in range(1, 9))])
        tables.append(
            TableToPack(
                name,
                TableBitWidths(table_rows, dim, bounds, bits, ranks),
                lambda start, stop, weight=weight: weight[start:stop],  # type: ignore[misc]
                alpha,
                torch.zeros(dim),
                torch.ones(dim),
            )
        )
    configs = [
        EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=d, feature_names=[f"f{n}"])
        for n, r, d in zip(names, rows, dims, strict=True)
    ]
    model = mpe.PackedEmbeddingBagCollection(configs, pack_tables(tables)).eval()
    requests = []
    for batch, pooling in [(1, 1), (1, 20), (7, 3), (64, 10), (512, 20), (2048, 5)]:
        lengths = torch.randint(2 * pooling + 1, (3, batch), generator=generator)
        ids = [
            torch.randint(table_rows, (int(each.sum()),), generator=generator)
            for table_rows, each in zip(rows, lengths, strict=True)
        ]
        requests.append(
            KeyedJaggedTensor.from_lengths_sync([f"f{name}" for name in names], torch.cat(ids), lengths.flatten())
        )
    expected = [model(request).values() for request in requests]
    answered = [0] * 8

    def ask(thread: int) -> None:
        number = (thread + answered[thread]) % len(requests)
        assert torch.equal(model(requests[number]).values(), expected[number])
        answered[thread] += 1

    repeat_in_threads([lambda thread=thread: ask(thread) for thread in range(8)], stress_seconds)
    assert min(answered) >= len(requests), answered
