"""Whether packed tables say what the retrained ones do."""

import torch
import torch.distributed as dist
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection

TOLERANCE = 1e-5
"""Largest difference of an element, as a part of what rows can reach: max over bit-widths of ``alpha_b * 2**(b-1)``,
plus the largest offset and 0-bit element, times the weight of the largest bag. Float32's rounding stays a hundred times
below it, a code that is off by one is at least ``2**-7`` of what its width reaches."""


@torch.no_grad()
def check_agreement(
    trained: MPEEmbeddingBagCollection | ShardedMPEEmbeddingBagCollection,
    packed: PackedEmbeddingBagCollection,
    probe: KeyedJaggedTensor,
) -> None:
    """Compare a packed collection with the retrained one that it was made from on one batch.

    For a sharded collection every rank calls it, each with a batch of its own; all raise if one finds a difference.

    Args:
        trained (MPEEmbeddingBagCollection | ShardedMPEEmbeddingBagCollection): in the retrain phase; stays as it is,
            the fused optimizer's iteration and the remembered order of features included.
        packed (PackedEmbeddingBagCollection): with the "packed" backend and float32 output.
        probe (KeyedJaggedTensor): at least the collection's features, on the devices of both.

    Raises:
        RuntimeError: naming table and feature, if an element differs by more than :data:`TOLERANCE` allows.
        ValueError: if the probe lacks a feature or weights, or an id is not a row of its table.
    """
    group = trained.process_group if isinstance(trained, ShardedMPEEmbeddingBagCollection) else None
    problem, got = "", None
    try:
        got = packed(probe)
    except (IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        problem = f"the packed model cannot read the probe batch: {error.args[0] if error.args else error}"
    # Before the retrained model's collectives: a rank that stops would leave the others waiting in them.
    if problem := _first_problem(problem, group):
        raise ValueError(problem)
    assert got is not None
    if isinstance(trained, ShardedMPEEmbeddingBagCollection):
        want = trained.forward_without_trace(probe)
    else:
        want = trained.quantized_forward(probe)
    if problem := _first_problem(_difference(got, want, packed, probe), group):
        raise RuntimeError(problem)


def _difference(
    got: KeyedTensor, want: KeyedTensor, packed: PackedEmbeddingBagCollection, probe: KeyedJaggedTensor
) -> str:
    """What differs first, in the order of the tables; empty if nothing."""
    configs, tables = packed.embedding_bag_configs(), packed.packed_tables()
    index = {table.name: t for t, table in enumerate(tables.tables)}
    # Keys are in another order in a sharded collection's output.
    found, wanted = got.to_dict(), want.to_dict()
    half_codes = torch.tensor([0.0, *(2.0 ** (bits - 1) for bits in range(1, 9))])
    for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True):
        t = index[config.name]
        scales, zero_row = int(tables.scale_index[t]), int(tables.zero_row_offsets[t])
        offset = int(tables.beta_offsets[scales])
        reach = (tables.alpha[scales].cpu() * half_codes).max()
        reach += tables.beta[offset : offset + config.embedding_dim].abs().max().cpu()
        if zero_row >= 0:
            reach += tables.zero_rows[zero_row : zero_row + config.embedding_dim].abs().max().cpu()
        for name, feature in zip(names, config.feature_names, strict=True):
            allowed = TOLERANCE * float(reach) * _largest_bag(probe, feature, config.pooling)
            difference = (found[name].float() - wanted[name].float()).abs()
            largest = float(difference.max()) if difference.numel() else 0.0
            if not largest <= allowed:  # NaN is a difference
                return (
                    f"table {config.name}, feature {feature}: packed and retrained embeddings of the probe batch "
                    f"differ by {largest:.2e}, where rounding explains {allowed:.2e}: the emitted model is wrong"
                )
    return ""


def _largest_bag(probe: KeyedJaggedTensor, feature: str, pooling: PoolingType) -> float:
    """The largest sum of weights of a bag of one feature, at least 1."""
    if pooling == PoolingType.MEAN:
        return 1.0
    bags = probe[feature]
    lengths = bags.lengths().long()
    weights = bags.weights_or_none()
    if weights is None or lengths.numel() == 0:
        return max(1.0, float(lengths.max())) if lengths.numel() else 1.0
    of_bag = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    sums = torch.zeros(len(lengths), device=weights.device).index_add_(0, of_bag, weights.float().abs())
    return max(1.0, float(sums.max()))


def _first_problem(problem: str, group: dist.ProcessGroup | None) -> str:
    """The first rank's problem on every rank; empty if none has one."""
    if group is None or dist.get_world_size(group) == 1:
        return problem
    problems: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    return next((f"rank {rank}: {each}" for rank, each in enumerate(problems) if each), "")
