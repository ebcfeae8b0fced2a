"""Prepared training data: read a log once, give its values ids by frequency, and iterate over TorchRec batches."""

from torchrec_mpe.data.dataset import Field, PreparedDataset
from torchrec_mpe.data.prepare import prepare_criteo, prepare_csv
from torchrec_mpe.data.synthetic import write_synthetic_log

__all__ = ["Field", "PreparedDataset", "prepare_criteo", "prepare_csv", "write_synthetic_log"]
