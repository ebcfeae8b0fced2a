"""From a trained checkpoint to packed rows, without a search."""

from torchrec_mpe.convert.checkpoint_files import open_checkpoint
from torchrec_mpe.convert.checkpoint_tables import CheckpointTable, find_tables
from torchrec_mpe.convert.convert import Conversion, TableErrors, convert_checkpoint

__all__ = [
    "CheckpointTable",
    "Conversion",
    "TableErrors",
    "convert_checkpoint",
    "find_tables",
    "open_checkpoint",
]
