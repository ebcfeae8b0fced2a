"""A copy of a trained model with other collections in place of its own."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchrec.distributed.types import ShardedModule

from torchrec_mpe.upstream.feature_processed import sharded_collection_inside, unsharded_around


def copy_around(source: nn.Module, replaced: Mapping[Any, nn.Module]) -> nn.Module:
    """A copy in eval mode that shares nothing with a model but what cannot be copied.

    What a sharded feature-processed collection has around a replaced one comes along, unsharded. Other sharded modules,
    such as a ShardedEmbeddingCollection, hold process groups, which have no copies: the copy has the module itself, in
    the mode that it is in.

    Args:
        source (nn.Module): without what DistributedModelParallel puts around it.
        replaced (Mapping): modules of it, and what takes their place; neither is copied.
    """
    # deepcopy finds these in its memo and never touches the trained rows.
    memo: dict[int, Any] = {id(module): other for module, other in replaced.items()}
    for module in source.modules():
        if id(module) in memo:
            continue
        inner = sharded_collection_inside(module)
        if inner is not None and id(inner) in memo:
            memo[id(module)] = unsharded_around(module, memo[id(inner)])
        elif isinstance(module, ShardedModule):
            memo[id(module)] = module
    copied: nn.Module = copy.deepcopy(source, memo)
    shared = [module for module in source.modules() if memo.get(id(module)) is module]
    modes = {module: module.training for kept in shared for module in kept.modules()}
    copied.eval()
    for module, training in modes.items():
        module.training = training
    return copied
