"""The learned quantizers: replicated parameters, one module per embedding dimension."""

from torchrec_mpe.quantizer.row_quantizer import RetrainQuantizer, RowQuantizer, SearchQuantizer
from torchrec_mpe.quantizer.search_config import SearchConfig

__all__ = ["RetrainQuantizer", "RowQuantizer", "SearchConfig", "SearchQuantizer"]
