"""What DistributedModelParallel and the planner need to shard our collections."""

from typing import Any

from torch import nn
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder

from torchrec_mpe.distributed.cached_embeddingbag import CachedEmbeddingBagCollectionSharder
from torchrec_mpe.distributed.embeddingbag import MPEEmbeddingBagCollectionSharder


def sharders(fused_params: dict[str, Any] | None = None) -> list[ModuleSharder[nn.Module]]:
    """TorchRec's default sharders with ours for MPEEmbeddingBagCollection and CachedEmbeddingBagCollection.

    Args:
        fused_params (Optional[Dict[str, Any]]): of the TBEs, for example
            ``{"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.02}``.
    """
    return [
        MPEEmbeddingBagCollectionSharder(fused_params=fused_params),
        CachedEmbeddingBagCollectionSharder(fused_params=fused_params),
        *get_default_sharders(),
    ]
