"""What DistributedModelParallel and the planner need to shard our collections."""

from typing import Any

from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder

from torchrec_mpe.distributed.cached_embeddingbag import CachedEmbeddingBagCollectionSharder
from torchrec_mpe.distributed.embeddingbag import MPEEmbeddingBagCollectionSharder
from torchrec_mpe.upstream.feature_processed import FeatureProcessedSharder


def sharders(fused_params: dict[str, Any] | None = None) -> list[ModuleSharder[nn.Module]]:
    """TorchRec's default sharders with ours for MPEEmbeddingBagCollection and CachedEmbeddingBagCollection.

    A FeatureProcessedEmbeddingBagCollection is sharded by the sharder of the collection in it.

    Args:
        fused_params (Optional[Dict[str, Any]]): of the TBEs, for example
            ``{"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.02}``.
    """
    ours: list[EmbeddingBagCollectionSharder] = [
        MPEEmbeddingBagCollectionSharder(fused_params=fused_params),
        CachedEmbeddingBagCollectionSharder(fused_params=fused_params),
    ]
    plain = EmbeddingBagCollectionSharder(fused_params=fused_params)
    of_torchrec = get_default_sharders()
    inside = FeatureProcessedSharder([plain, *ours])
    prepared = FeatureProcessedSharder([plain, *ours], prepared=True)
    return [*ours, prepared, *(inside if s.module_type is inside.module_type else s for s in of_torchrec)]
