"""Packed models spread over the devices of one host."""

import copy
import logging
from collections.abc import Sequence

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.distributed.planner.packed_placement import PackedPlacement
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.inference.sharded.placement import free_memory, place_collections
from torchrec_mpe.inference.sharded.replicas import ReplicatedModel
from torchrec_mpe.inference.sharded.sharded_collection import ShardedPackedEmbeddingBagCollection, check_shards
from torchrec_mpe.inference.sharded.verify import verify_sharded

logger = logging.getLogger(__name__)


@torch.no_grad()
def shard_packed(
    model: nn.Module,
    devices: Sequence[torch.device | str],
    *,
    placement: PackedPlacement | None = None,
    memory: int | None = None,
    output_device: torch.device | str | None = None,
    probe: KeyedJaggedTensor | None = None,
) -> tuple[nn.Module, PackedPlacement]:
    """Spread the packed tables of a model over the devices of this process, and verify their values.

    Tables that fit one device together are replicated: every device gets the whole model, requests take turns and
    nothing is communicated. Else whole tables, or ranges of rows of tables larger than a device, go to the fewest
    devices that hold them, and the rest of the model to the output device.

    ``torchrec.fx.Tracer`` with ``LEAF_MODULES`` traces the result, or a replica, and ``torch.jit.script`` compiles the
    traced model. An unsharded model is sharded over one device for that, which copies no table.

    Rows are moved, never unpacked. Before it returns, every sharded collection is compared with the unsharded one on a
    probe batch: bags of one id, and all bags of whole tables, must be equal bit for bit.

    Args:
        model (nn.Module): holds, or is, PackedEmbeddingBagCollections with the "packed" backend, as
            :func:`emit_inference_model` and :func:`load` return; stays as it is.
        devices (Sequence[torch.device]): of this host, at least one; one may occur twice.
        placement (Optional[PackedPlacement]): as :meth:`MPEShardingPlanner.replan` returns; None: made here, by the
            bytes that the packed tables really have.
        memory (Optional[int]): bytes of each device for packed tables, where ``placement`` is None; by default 85% of
            what is free on the CUDA device that has the least free, and enough for all tables on the CPU.
        output_device (Optional[torch.device]): of pooled embeddings and dense layers, if tables are not replicated; the
            first device by default.
        probe (Optional[KeyedJaggedTensor]): the batch to compare on, with the features of all collections; None: see
            :func:`torchrec_mpe.inference.sharded.verify.verify_sharded`.

    Returns:
        tuple[nn.Module, PackedPlacement]: a model in eval mode, with :class:`ShardedPackedEmbeddingBagCollection` in
        place of packed ones, a :class:`ReplicatedModel` of such if there are copies; and what was chosen.

    Raises:
        PlannerError: if the tables do not fit the devices, with the bytes of each.
        RuntimeError: naming table and feature, if sharded and unsharded embeddings of the probe batch differ.
        TypeError: if a collection has the fbgemm backend.
        ValueError: if there is no device or collection; naming the table, if the placement is not of these tables.

    Example::

        model = mpe.load("artifact/", model)
        sharded, placement = shard_packed(model, ["cuda:0", "cuda:1"], memory=40 << 30)
        print(placement)
        logits = sharded(batch)
    """
    places = [torch.device(device) for device in devices]
    if not places:
        raise ValueError("there is no device to shard over")
    collections = {name: m for name, m in model.named_modules() if isinstance(m, PackedEmbeddingBagCollection)}
    if not collections:
        raise ValueError(
            f"{type(model).__name__} holds no PackedEmbeddingBagCollection: emit_inference_model makes them"
        )
    if placement is None:
        placement = place_collections(collections, len(places), free_memory(places) if memory is None else memory)
    rows = {t.name: t.num_embeddings for c in collections.values() for t in c.embedding_bag_configs()}
    check_shards(rows, placement.shards, len(places))
    logger.info("%s", placement.summary())
    if placement.replicate:
        replicas = [_sharded(model, collections, placement, [device], device, probe) for device in places]
        return (replicas[0] if len(replicas) == 1 else ReplicatedModel(replicas, places).eval()), placement
    output = places[0] if output_device is None else torch.device(output_device)
    return _sharded(model, collections, placement, places, output, probe), placement


def _sharded(
    model: nn.Module,
    collections: dict[str, PackedEmbeddingBagCollection],
    placement: PackedPlacement,
    devices: Sequence[torch.device],
    output_device: torch.device,
    probe: KeyedJaggedTensor | None,
) -> nn.Module:
    # deepcopy finds the sharded collections in its memo and copies no packed table.
    memo: dict[int, nn.Module] = {}
    for collection in collections.values():
        own = {config.name for config in collection.embedding_bag_configs()}
        shards = [shard for shard in placement.shards if shard.table in own]
        sharded = ShardedPackedEmbeddingBagCollection(collection, shards, devices, output_device)
        verify_sharded(sharded, collection, probe)
        memo[id(collection)] = sharded
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied.to(output_device).eval()
