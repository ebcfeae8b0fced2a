"""Mixed-precision embedding tables for TorchRec: learned bit-widths from 0 to 8 bits per group of rows.

Source: Mixed-Precision Embeddings for Large-Scale Recommendation Models (arXiv 2409.20305).
"""

from torchrec_mpe.versions import __version__, warn_or_raise_at_import

warn_or_raise_at_import()

from torchrec_mpe.bit_widths import TableBitWidths  # noqa: E402
from torchrec_mpe.distributed import (  # noqa: E402
    MPEEmbeddingBagCollectionSharder,
    ShardedMPEEmbeddingBagCollection,
    sharders,
)
from torchrec_mpe.frequency import FrequencyCounter, count_frequencies  # noqa: E402
from torchrec_mpe.inference import emit_inference_model, load, save  # noqa: E402
from torchrec_mpe.initialization import RowInitialization  # noqa: E402
from torchrec_mpe.modules import MPEEmbeddingBagCollection, PackedEmbeddingBagCollection  # noqa: E402
from torchrec_mpe.precision import (  # noqa: E402
    PrecisionPlan,
    cut_precision,
    precision_from_frequencies,
    uniform_precision,
)
from torchrec_mpe.prepare import prepare_retrain_, prepare_search_, reset_rows_  # noqa: E402
from torchrec_mpe.quantizer import SearchConfig  # noqa: E402
from torchrec_mpe.search import bit_penalty, sample_precision  # noqa: E402

__all__ = [
    "FrequencyCounter",
    "MPEEmbeddingBagCollection",
    "MPEEmbeddingBagCollectionSharder",
    "PackedEmbeddingBagCollection",
    "PrecisionPlan",
    "RowInitialization",
    "SearchConfig",
    "ShardedMPEEmbeddingBagCollection",
    "TableBitWidths",
    "__version__",
    "bit_penalty",
    "count_frequencies",
    "cut_precision",
    "emit_inference_model",
    "load",
    "precision_from_frequencies",
    "prepare_retrain_",
    "prepare_search_",
    "reset_rows_",
    "sample_precision",
    "save",
    "sharders",
    "uniform_precision",
]
