"""Mixed-precision embedding tables for TorchRec: learned bit-widths from 0 to 8 bits per group of rows.

Sources: Mixed-Precision Embeddings for Large-Scale Recommendation Models (arXiv 2409.20305); Mixed-Precision Embedding
Using a Cache (arXiv 2010.11305).

Names are imported when they are first used, so that `torchrec-mpe doctor` can run where torch, fbgemm or torchrec is
missing; using a name there raises an ImportError that says what to install.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchrec_mpe.versions import __version__, warn_or_raise_at_import

if TYPE_CHECKING:
    from torchrec_mpe.bit_widths import TableBitWidths
    from torchrec_mpe.cache import CacheConfig, CacheStatistics, caches_from_frequencies
    from torchrec_mpe.checkpoint import Checkpoint, Checkpoints
    from torchrec_mpe.convert import convert_checkpoint
    from torchrec_mpe.distributed import (
        CachedEmbeddingBagCollectionSharder,
        MPEEmbeddingBagCollectionSharder,
        ShardedCachedEmbeddingBagCollection,
        ShardedMPEEmbeddingBagCollection,
        TrackedFrequencies,
        sharders,
        track_frequencies_,
    )
    from torchrec_mpe.frequency import FrequencyCounter, count_frequencies
    from torchrec_mpe.inference import emit_inference_model, export, load, load_exported, save
    from torchrec_mpe.initialization import RowInitialization
    from torchrec_mpe.modules import (
        FbgemmTableBatchedEmbeddingBags,
        MPEEmbeddingBagCollection,
        PackedEmbeddingBagCollection,
        PackedTableBatchedEmbeddingBags,
    )
    from torchrec_mpe.modules.cached_embedding_bag_collection import CachedEmbeddingBagCollection
    from torchrec_mpe.planner import MPEShardingPlanner, MPEStorageReservation, PackedPlacement
    from torchrec_mpe.precision import (
        PrecisionPlan,
        cut_precision,
        precision_from_errors,
        precision_from_frequencies,
        uniform_precision,
    )
    from torchrec_mpe.prepare import prepare_retrain_, prepare_search_, reset_rows_
    from torchrec_mpe.quantizer import SearchConfig
    from torchrec_mpe.search import bit_penalty, sample_precision
    from torchrec_mpe.serving import PackedEmbeddingBagCollectionSharder, shard_packed

_MODULES = {
    "TableBitWidths": "torchrec_mpe.bit_widths",
    "CacheConfig": "torchrec_mpe.cache",
    "CacheStatistics": "torchrec_mpe.cache",
    "caches_from_frequencies": "torchrec_mpe.cache",
    "Checkpoint": "torchrec_mpe.checkpoint",
    "Checkpoints": "torchrec_mpe.checkpoint",
    "convert_checkpoint": "torchrec_mpe.convert",
    "CachedEmbeddingBagCollectionSharder": "torchrec_mpe.distributed",
    "MPEEmbeddingBagCollectionSharder": "torchrec_mpe.distributed",
    "ShardedCachedEmbeddingBagCollection": "torchrec_mpe.distributed",
    "ShardedMPEEmbeddingBagCollection": "torchrec_mpe.distributed",
    "TrackedFrequencies": "torchrec_mpe.distributed",
    "sharders": "torchrec_mpe.distributed",
    "track_frequencies_": "torchrec_mpe.distributed",
    "FrequencyCounter": "torchrec_mpe.frequency",
    "count_frequencies": "torchrec_mpe.frequency",
    "emit_inference_model": "torchrec_mpe.inference",
    "export": "torchrec_mpe.inference",
    "load": "torchrec_mpe.inference",
    "load_exported": "torchrec_mpe.inference",
    "save": "torchrec_mpe.inference",
    "RowInitialization": "torchrec_mpe.initialization",
    "MPEEmbeddingBagCollection": "torchrec_mpe.modules",
    "FbgemmTableBatchedEmbeddingBags": "torchrec_mpe.modules",
    "PackedEmbeddingBagCollection": "torchrec_mpe.modules",
    "PackedTableBatchedEmbeddingBags": "torchrec_mpe.modules",
    "CachedEmbeddingBagCollection": "torchrec_mpe.modules.cached_embedding_bag_collection",
    "MPEShardingPlanner": "torchrec_mpe.planner",
    "MPEStorageReservation": "torchrec_mpe.planner",
    "PackedPlacement": "torchrec_mpe.planner",
    "PrecisionPlan": "torchrec_mpe.precision",
    "cut_precision": "torchrec_mpe.precision",
    "precision_from_errors": "torchrec_mpe.precision",
    "precision_from_frequencies": "torchrec_mpe.precision",
    "uniform_precision": "torchrec_mpe.precision",
    "prepare_retrain_": "torchrec_mpe.prepare",
    "prepare_search_": "torchrec_mpe.prepare",
    "reset_rows_": "torchrec_mpe.prepare",
    "SearchConfig": "torchrec_mpe.quantizer",
    "bit_penalty": "torchrec_mpe.search",
    "sample_precision": "torchrec_mpe.search",
    "PackedEmbeddingBagCollectionSharder": "torchrec_mpe.serving",
    "shard_packed": "torchrec_mpe.serving",
}

__all__ = [
    "CacheConfig",
    "CacheStatistics",
    "CachedEmbeddingBagCollection",
    "CachedEmbeddingBagCollectionSharder",
    "Checkpoint",
    "Checkpoints",
    "FbgemmTableBatchedEmbeddingBags",
    "FrequencyCounter",
    "MPEEmbeddingBagCollection",
    "MPEEmbeddingBagCollectionSharder",
    "MPEShardingPlanner",
    "MPEStorageReservation",
    "PackedEmbeddingBagCollection",
    "PackedEmbeddingBagCollectionSharder",
    "PackedPlacement",
    "PackedTableBatchedEmbeddingBags",
    "PrecisionPlan",
    "RowInitialization",
    "SearchConfig",
    "ShardedCachedEmbeddingBagCollection",
    "ShardedMPEEmbeddingBagCollection",
    "TableBitWidths",
    "TrackedFrequencies",
    "__version__",
    "bit_penalty",
    "caches_from_frequencies",
    "convert_checkpoint",
    "count_frequencies",
    "cut_precision",
    "emit_inference_model",
    "export",
    "load",
    "load_exported",
    "precision_from_errors",
    "precision_from_frequencies",
    "prepare_retrain_",
    "prepare_search_",
    "reset_rows_",
    "sample_precision",
    "save",
    "shard_packed",
    "sharders",
    "track_frequencies_",
    "uniform_precision",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_or_raise_at_import()
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
