"""Precision plans: one bit-width per row, searched, straight from frequencies, or from the error of trained rows."""

from torchrec_mpe.precision.from_errors import PostTrainingPrecision, precision_from_errors
from torchrec_mpe.precision.from_frequencies import cut_precision, precision_from_frequencies, uniform_precision
from torchrec_mpe.precision.plan import PrecisionPlan

__all__ = [
    "PostTrainingPrecision",
    "PrecisionPlan",
    "cut_precision",
    "precision_from_errors",
    "precision_from_frequencies",
    "uniform_precision",
]
