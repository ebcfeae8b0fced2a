"""Same seed and plan: the same bits. Another plan: the same initial rows, bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.optim.optimizers import in_backward_optimizer_filter

import torchrec_mpe as mpe
from tests.distributed.equality import (
    CW,
    DP,
    GRID,
    INITIALIZATION,
    LEARNING_RATE,
    RW,
    TW,
    TWCW,
    TWRW,
    Case,
    enter,
    local_batch,
    prepared_model,
    shard,
    tables,
)
from tests.distributed.ranks import Ranks

CASES = [
    Case((TWRW, TWCW, GRID, RW, CW, DP, TW), optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD),
    Case((RW, TW, TWRW, CW), phase="retrain", weighted=True, optimizer=EmbOptimType.EXACT_ADAGRAD),
    Case((TW, GRID, RW, TWCW), phase="search, then retrain", kernel="dense"),
    Case((TWRW, RW, TW, CW), phase="plain", mean_tables=("t0",)),
]
Bits = dict[str, np.ndarray[Any, Any]]


def train(case: Case) -> Bits:
    """Losses, gradients, rows, optimizer state and quantizers of this rank after three steps."""
    model = shard(prepared_model(case), case)
    enter(model, case)
    dense = [p for _, p in in_backward_optimizer_filter(model.named_parameters())]
    optimizer = torch.optim.Adam(dense, lr=LEARNING_RATE)
    bits: Bits = {}
    for step in range(3):
        features, targets = local_batch(step, case, dist.get_rank(), dist.get_world_size())
        loss = ((model(features) - targets) ** 2).mean()
        if case.phase == "search":
            loss = loss + mpe.bit_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bits[f"loss {step}"] = loss.detach().numpy()
    for table, row, column, values in model.module.ebc.local_shards():
        bits[f"rows {table} {row} {column}"] = values.detach().numpy().copy()
    for k, kernel in enumerate(model.module.ebc.kernels()):
        if case.kernel == "fused" and hasattr(kernel.emb_module, "split_optimizer_states"):
            states = kernel.emb_module.split_optimizer_states()
            bits |= {f"state {k} {t}": s[0].numpy().copy() for t, s in enumerate(states) if s}
    bits |= {name: p.detach().numpy().copy() for name, p in model.named_parameters() if "embedding_bags" not in name}
    return bits


def train_twice(case: Case) -> tuple[Bits, Bits]:
    return train(case), train(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_seed_and_plan_give_the_same_bits(case: Case, four_ranks: Ranks) -> None:
    for first, second in four_ranks.run(train_twice, case):
        assert first.keys() == second.keys() and any(name.startswith("rows") for name in first)
        for name, values in first.items():
            np.testing.assert_array_equal(second[name], values, err_msg=name)


def initial_rows(cases: list[Case]) -> list[list[tuple[str, int, int, np.ndarray[Any, Any]]]]:
    """Shards of every case as training begins, after a search and its reset too."""
    found = []
    for case in cases:
        model = shard(prepared_model(case), case)
        enter(model, case)
        found.append([(t, r, c, values.detach().numpy().copy()) for t, r, c, values in model.module.ebc.local_shards()])
    return found


def test_every_plan_starts_from_the_same_rows(four_ranks: Ranks, two_ranks: Ranks) -> None:
    on_four = [Case((kind,) * 7) for kind in (TW, RW, CW, TWRW, TWCW, GRID, DP)] + [
        Case((TWRW, TWCW, GRID, RW, CW, DP, TW), phase=phase) for phase in ("retrain", "plain", "search, then retrain")
    ]
    on_two = [Case((RW, CW, TW, DP, RW, CW, TW), phase=phase) for phase in ("search", "retrain", "plain")]
    whole = {
        t.name: INITIALIZATION.fill_(torch.empty(t.num_embeddings, t.embedding_dim), t.name).numpy()
        for t in tables(on_four[0])
    }
    for ranks, cases in ((four_ranks, on_four), (two_ranks, on_two)):
        for by_case in ranks.run(initial_rows, cases):
            for case, shards in zip(cases, by_case, strict=True):
                for table, row, column, values in shards:
                    part = np.s_[row : row + values.shape[0], column : column + values.shape[1]]
                    np.testing.assert_array_equal(values, whole[table][part], err_msg=f"{table} of {case}")
