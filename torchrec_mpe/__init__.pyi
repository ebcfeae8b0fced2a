"""The public names, each once: what type checkers see, and what is imported at first use."""

# Train: collections, counts, the search and retraining.
from .cache.config import CacheConfig as CacheConfig
from .cache.from_frequencies import caches_from_frequencies as caches_from_frequencies
from .distributed.checkpoint.checkpoints import Checkpoints as Checkpoints
from .distributed.default_sharders import sharders as sharders
from .distributed.frequencies import track_frequencies_ as track_frequencies_
from .distributed.phases import prepare_retrain_ as prepare_retrain_
from .distributed.phases import prepare_search_ as prepare_search_
from .distributed.phases import reset_rows_ as reset_rows_
from .modules.cached_embedding_bag_collection import CachedEmbeddingBagCollection as CachedEmbeddingBagCollection
from .modules.embedding_bag_collection import MPEEmbeddingBagCollection as MPEEmbeddingBagCollection
from .modules.penalty import add_bit_penalty_ as add_bit_penalty_
from .modules.penalty import bit_penalty as bit_penalty
from .modules.sampling import sample_precision as sample_precision
from .modules.search_config import SearchConfig as SearchConfig
from .precision.frequency_counter import FrequencyCounter as FrequencyCounter
from .precision.frequency_counter import count_frequencies as count_frequencies

# isort: split
# Plan: which bits a row gets, and which rank which rows.
from .distributed.planner.planner import MPEShardingPlanner as MPEShardingPlanner
from .precision.from_frequencies import precision_from_frequencies as precision_from_frequencies
from .precision.plan import PrecisionPlan as PrecisionPlan

# isort: split
# Compress: code the tables of a trained model in the metric of its loss.
from .inference.compress.compress import compress as compress
from .inference.compress.curvature import Curvature as Curvature
from .inference.compress.curvature import measure_curvature as measure_curvature
from .inference.compress.distill import distill_ as distill_
from .inference.compress.distill import distillation_loss as distillation_loss

# isort: split
# Serve: packed models, their artifacts and programs.
from .inference.artifact.save_load import load as load
from .inference.artifact.save_load import save as save
from .inference.convert.convert import convert_checkpoint as convert_checkpoint
from .inference.delta import load_delta as load_delta
from .inference.delta import save_delta as save_delta
from .inference.emit import emit_inference_model as emit_inference_model
from .inference.export.export_model import export as export
from .inference.export.exported_model import load_exported as load_exported
from .inference.hot_swap import ServedModel as ServedModel
from .inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection as PackedEmbeddingBagCollection
from .inference.sharded.shard import shard_packed as shard_packed
from .inference.sharded.sharder import PackedEmbeddingBagCollectionSharder as PackedEmbeddingBagCollectionSharder

# isort: split
from .upstream.versions import __version__ as __version__
